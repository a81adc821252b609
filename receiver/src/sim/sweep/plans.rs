//! Which crash images are built from what is not durable.
//!
//! Up to [`SUBSETS_MAX`] changes: every subset of them. More: all, none, each one alone missing, each one alone there, every
//! prefix. Beside that every write torn: half of it, its first or last sector only, a hole in the middle, every other
//! sector, nothing of it but the length; the gap zeroes and garbage; the other changes there, missing, or those before it there.
//! On top a sample in which every change and every sector is decided by a coin that is the same in every run.

use rand::{Rng, SeedableRng};

use crate::sim::disk::chosen;
use crate::sim::model::{Fate, Unit};

/// Up to so many changes, every subset is tried.
const SUBSETS_MAX: usize = 6;
/// Random images at a crash point.
const SAMPLES: usize = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    Full,
    /// All, none, each one alone missing or there, prefixes, and every write torn in the middle.
    Quick,
}

/// A fate for each unit, in their order.
pub(super) type Plan = Vec<Fate>;

/// The fate of the unit of time `at`.
pub(super) fn fate(units: &[Unit], plan: &Plan, at: u64) -> Fate {
    let i = units.binary_search_by_key(&at, |u| u.at).ok();
    i.and_then(|i| plan.get(i)).cloned().unwrap_or(Fate::Lost)
}

/// The structured plans and the sampled ones.
pub(super) fn plans(units: &[Unit], effort: Effort, seed: u64) -> (Vec<Plan>, Vec<Plan>) {
    let n = units.len();
    let of = |kept: &dyn Fn(usize) -> bool| -> Plan { (0..n).map(|i| if kept(i) { Fate::Kept } else { Fate::Lost }).collect() };
    if n == 0 {
        return (vec![Plan::new()], Vec::new());
    }
    let mut plans = Vec::new();
    if n <= SUBSETS_MAX && effort == Effort::Full {
        plans.extend((0..1_u32 << n).map(|bits| of(&|i| bits & (1 << i) != 0)));
    } else {
        plans.push(of(&|_| false));
        for one in 0..n {
            plans.push(of(&|i| i != one));
            plans.push(of(&|i| i == one));
            plans.push(of(&|i| i <= one));
        }
    }
    for (at, unit) in units.iter().enumerate().filter(|(_, u)| u.sectors > 0) {
        for torn in tears(unit.sectors, effort) {
            let others: &[&dyn Fn(usize) -> bool] =
                if effort == Effort::Full { &[&|_| true, &|_| false, &|i| i < at] } else { &[&|_| true] };
            for kept in others {
                let mut plan = of(kept);
                plan[at] = torn.clone();
                plans.push(plan);
            }
        }
    }
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    let samples = if effort == Effort::Full { SAMPLES } else { 0 };
    let mut choose = |n: u32| rng.random_range(0..n);
    let sampled = (0..samples).map(|_| units.iter().map(|u| chosen(u, &mut choose)).collect()).collect();
    (plans, sampled)
}

/// The ways in which a write of so many sectors is torn.
fn tears(sectors: usize, effort: Effort) -> Vec<Fate> {
    let torn = |kept: Vec<bool>, grown, garbage| Fate::Torn { kept, grown, garbage };
    let of = |kept: &dyn Fn(usize) -> bool| -> Vec<bool> { (0..sectors).map(kept).collect() };
    let half = sectors.div_ceil(2);
    if effort == Effort::Quick {
        return vec![torn(of(&|i| i < half), true, false), torn(of(&|i| i >= half), true, true)];
    }
    let mut fates = vec![torn(of(&|_| false), true, false), torn(of(&|_| false), true, true)];
    if sectors > 1 {
        let last = sectors - 1;
        let shapes: [&dyn Fn(usize) -> bool; 7] =
            [&|i| i < half, &|i| i >= half, &|i| i == 0, &|i| i == last, &|i| i == 0 || i == last, &|i| i != half, &|i| {
                i % 2 == 0
            }];
        for shape in shapes {
            fates.push(torn(of(shape), true, false));
            fates.push(torn(of(shape), true, true));
            fates.push(torn(of(shape), false, false));
        }
    }
    fates
}
