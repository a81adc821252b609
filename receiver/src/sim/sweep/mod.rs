//! The crash-point sweep: a crash after every single change of the store, everything not durable kept, lost and torn; what is
//! reopened is compared with an oracle.
//!
//! A workload runs on a traced disk and notes, at every change, what must be found from then on and what may be. For every prefix
//! of the trace the disk's model gives crash images (`plans` says which); each different image is opened with the real
//! code (`examine`): every acknowledged epoch is there, byte for byte at every point; nothing that was not sealed; the seal
//! in flight counts whole or not at all; generation and role are the old or the new ones, the new ones if they were answered.
//! Then the reopened group has to take another epoch. Three things are swept:
//! - power loss in the workload,
//! - power loss while the start after a power loss recovers, and just after it,
//! - power loss after the process was killed at any change, restarted, and said what it holds.
//!
//! Sabotage shows that the sweep sees something: a trace in which syncs are missing must fail.

mod examine;
mod plans;
mod workload;

use std::collections::BTreeSet;

use super::model::{Change, Model};
use examine::{Examiner, Found};
use plans::Effort;
pub(super) use workload::folder;
use workload::{Expect, Life, Run};

/// What was swept.
#[derive(Debug, Default)]
struct Counts {
    /// Prefixes of traces.
    points: usize,
    /// Images that were built.
    images: usize,
    /// Images that were built from random choices, beyond the structured ones.
    sampled: usize,
}

/// What the disk made of the change of this number; `None`: nothing.
type Distort<'a> = &'a dyn Fn(usize, &Change) -> Option<Change>;

/// Sweeps the changes of a trace from `from` on.
fn sweep(
    (trace, expects): (&[Change], &[(u64, Expect)]),
    from: usize,
    effort: Effort,
    examiner: &mut Examiner,
    distort: Distort<'_>,
) -> Result<Counts, String> {
    let (mut model, mut counts) = (Model::new(), Counts::default());
    for at in 0..=trace.len() {
        if let Some(change) = at.checked_sub(1).and_then(|i| trace.get(i).and_then(|c| distort(i, c))) {
            model.apply(&change);
        }
        if at < from {
            continue;
        }
        let expect = expects.iter().rev().find(|(since, _)| *since <= at as u64).map(|(_, e)| e);
        let expect = expect.ok_or("the workload has no first expectation")?;
        counts.points += 1;
        let units = model.units();
        let (structured, sampled) = plans::plans(&units, effort, at as u64);
        counts.sampled += sampled.len();
        for plan in structured.iter().chain(&sampled) {
            counts.images += 1;
            let image = model.image(&mut |unit| plans::fate(&units, plan, unit));
            let permitted = |found: &Found| expect.permits(found);
            examiner
                .examine(&image, &permitted)
                .map_err(|error| format!("change {at} ({:?}), {plan:?}: {error}", at.checked_sub(1).map(|i| &trace[i])))?;
        }
    }
    Ok(counts)
}

fn as_it_was(_: usize, change: &Change) -> Option<Change> {
    Some(change.clone())
}

fn power_loss(life: Life, (points_min, images_min): (usize, usize)) {
    let run = Run::whole(life);
    let trace = run.disk.trace();
    let mut examiner = Examiner::new(true);
    let counts = sweep((&trace, &run.expects), 0, Effort::Full, &mut examiner, &as_it_was).unwrap();
    eprintln!(
        "{life:?}: crash points: {}; images: {} ({} of them sampled); different ones opened: {}; of those, crashed again in recovery: {}",
        counts.points, counts.images, counts.sampled, examiner.opened, examiner.crashed_again
    );
    assert!(counts.points > points_min && counts.images > images_min, "the workload shrank: {counts:?}");
}

fn power_loss_after_a_kill(life: Life) {
    let total = Run::whole(life).disk.changes();
    let mut examiner = Examiner::new(false);
    let (mut all, mut kills) = (Counts::default(), 0);
    for kill in 1..total {
        let Some(run) = Run::killed_after(life, kill) else { continue };
        kills += 1;
        let counts = sweep((&run.disk.trace(), &run.expects), kill as usize, Effort::Quick, &mut examiner, &as_it_was)
            .unwrap_or_else(|error| panic!("killed after {kill}: {error}"));
        all.points += counts.points;
        all.images += counts.images;
    }
    eprintln!(
        "{life:?}: kills: {kills}; crash points: {}; images: {}; different ones opened: {}",
        all.points, all.images, examiner.opened
    );
    assert!(kills as u64 + 10 > total, "{kills} of {total}");
}

/// Power loss at every change of a life: creation, epochs, abandoned epochs, rollovers, stops, kills, promotion.
#[test]
fn power_loss_at_every_change() {
    power_loss(Life::Folding, (120, 5_000));
}

/// The same for thinning. Would catch old segments that are removed before the new one is on the disk under its name, a new one that is not all
/// there, and a start that takes what is left of the old ones for the journal.
#[test]
fn power_loss_at_every_change_of_thinning() {
    power_loss(Life::Thinning, (120, 3_000));
}

/// A process that is killed leaves writes that are not durable and that the next one reads as if they were. Would catch a
/// restart that answers with a point or a generation that a later power loss takes back.
#[test]
fn power_loss_after_a_kill_at_every_change() {
    power_loss_after_a_kill(Life::Folding);
}

/// Would catch a restart that removes old segments before the new one, which a killed process has named, is durable.
#[test]
fn power_loss_after_a_kill_at_every_change_of_thinning() {
    power_loss_after_a_kill(Life::Thinning);
}

/// A life whose trace is distorted must fail.
fn sabotaged(run: &Run, examiner: &mut Examiner, what: &str, distort: Distort<'_>) {
    let swept = sweep((&run.disk.trace(), &run.expects), 0, Effort::Full, examiner, distort);
    let error = swept.map(drop).expect_err(&format!("nobody notices that {what}"));
    eprintln!("{what}: {error}");
}

/// A life with a kill after a change of this kind, whose restart is robbed of some syncs, must fail.
fn sabotaged_restart(life: Life, what: &str, kill_after: &dyn Fn(&Change) -> bool, dropped: &dyn Fn(&Change) -> bool) {
    let whole = Run::whole(life).disk.trace();
    let kills = whole.iter().enumerate().filter(|(_, c)| kill_after(c)).map(|(i, _)| i + 1);
    let noticed = kills.filter_map(|kill| {
        let run = Run::killed_after(life, kill as u64)?;
        let start = kill..run.restarted as usize;
        let distort = |i: usize, c: &Change| (!(start.contains(&i) && dropped(c))).then(|| c.clone());
        sweep((&run.disk.trace(), &run.expects), kill, Effort::Quick, &mut Examiner::new(false), &distort).err()
    });
    let error = noticed.into_iter().next().unwrap_or_else(|| panic!("nobody notices that {what}"));
    eprintln!("{what}: {error}");
}

fn is_segment(path: &std::path::Path) -> bool {
    path.extension().is_some_and(|e| e == "seg")
}

fn is_seal(change: Option<&Change>) -> bool {
    matches!(change, Some(Change::Write { bytes, .. }) if bytes.starts_with(b"TWS1"))
}

/// The sweep has to see each of these.
#[test]
fn sabotage_is_noticed() {
    let run = Run::whole(Life::Folding);
    let trace = run.disk.trace();
    let keep = |change: &Change, dropped: bool| (!dropped).then(|| change.clone());
    // What an image shows does not depend on who is sabotaged.
    let mut examiner = Examiner::new(false);
    let mut sabotaged = |what: &str, distort: Distort<'_>| sabotaged(&run, &mut examiner, what, distort);
    sabotaged("a commit is not synced", &|i, c| {
        let after_seal = i > 0 && is_seal(trace.get(i - 1));
        keep(c, matches!(c, Change::Sync(path) if is_segment(path)) && after_seal)
    });
    sabotaged("a superblock has one slot", &|_, c| match c {
        Change::Write { file, bytes, .. } if file.ends_with("superblock") => {
            Some(Change::Write { file: file.clone(), offset: 0, bytes: bytes.clone() })
        }
        other => Some(other.clone()),
    });
    sabotaged("a superblock is not synced between its slots", &|i, c| {
        let between = matches!(trace.get(i + 1), Some(Change::Write { file, .. }) if file.ends_with("superblock"));
        keep(c, matches!(c, Change::Sync(path) if path.ends_with("db/superblock")) && between)
    });
    sabotaged("a full segment is not synced before the next one", &|i, c| {
        let before_next = matches!(trace.get(i + 1), Some(Change::CreateFile(path)) if is_segment(path));
        keep(c, matches!(c, Change::Sync(path) if is_segment(path)) && before_next)
    });
    sabotaged("a new segment's entry is not synced", &|_, c| {
        keep(c, matches!(c, Change::SyncFolder(path) if path.ends_with("journal")))
    });
    sabotaged("a cut segment is not synced", &|i, c| {
        let after_cut = i > 0 && matches!(trace.get(i - 1), Some(Change::Resize { file, .. }) if is_segment(file));
        keep(c, matches!(c, Change::Sync(_)) && after_cut)
    });
    sabotaged("the base is not synced before it is the beginning", &|_, c| {
        keep(c, matches!(c, Change::Sync(path) if path.parent().is_some_and(|p| p.ends_with("db/base"))))
    });
    for kind in ["raw", "sums"] {
        let is_kind = |path: &std::path::Path| path.extension().is_some_and(|e| e == kind);
        sabotaged(&format!("the .{kind} of the bases are not synced"), &|_, c| {
            keep(c, matches!(c, Change::Sync(path) if is_kind(path) && path.parent().is_some_and(|p| p.ends_with("db/base"))))
        });
    }
    let folders: BTreeSet<_> =
        trace.iter().filter_map(|c| if let Change::SyncFolder(path) = c { Some(path) } else { None }).collect();
    for folder in ["", "store", "store/a", "store/a/.new-db"] {
        assert!(folders.contains(&std::path::PathBuf::from(folder)), "'{folder}' is never synced");
        sabotaged(&format!("the folder '{folder}' is not synced"), &|_, c| {
            keep(c, matches!(c, Change::SyncFolder(path) if path == std::path::Path::new(folder)))
        });
    }
}

/// Would catch a sweep that does not see what a fold overwrites: nobody says that it has begun.
#[test]
fn sabotage_of_a_fold_is_noticed() {
    crate::sim::sabotage(Some(crate::sim::Sabotage::SilentFold));
    let run = Run::whole(Life::Folding);
    sabotaged(&run, &mut Examiner::new(false), "a fold begins without a word", &as_it_was);
    crate::sim::sabotage(None);
}

fn is_thinned(path: &std::path::Path) -> bool {
    path.extension().is_some_and(|e| e == "thin")
}

/// Each sync of thinning is needed.
#[test]
fn sabotage_of_thinning_is_noticed() {
    let run = Run::whole(Life::Thinning);
    let trace = run.disk.trace();
    let mut examiner = Examiner::new(false);
    let renamed = |change: Option<&Change>| matches!(change, Some(Change::Rename { from, .. }) if is_thinned(from));
    sabotaged(&run, &mut examiner, "a thinned segment is not synced before it has its name", &|_, c| {
        (!matches!(c, Change::Sync(path) if is_thinned(path))).then(|| c.clone())
    });
    sabotaged(&run, &mut examiner, "old segments are removed before the new one has its name on the disk", &|i, c| {
        let after_name = i > 0 && renamed(trace.get(i - 1));
        (!(matches!(c, Change::SyncFolder(_)) && after_name)).then(|| c.clone())
    });
    sabotaged_restart(
        Life::Thinning,
        "a start removes old segments before the new one has its name on the disk",
        &|c| renamed(Some(c)),
        &|c| matches!(c, Change::SyncFolder(path) if path.ends_with("journal")),
    );
}

/// What a start does before it answers is needed, each of it.
#[test]
fn sabotage_of_a_restart_is_noticed() {
    let named = |c: &Change, end: &str| matches!(c, Change::Sync(p) | Change::SyncFolder(p) if p.ends_with(end));
    sabotaged_restart(
        Life::Folding,
        "a start does not sync the last segment",
        &|c| is_seal(Some(c)),
        &|c| matches!(c, Change::Sync(path) if is_segment(path)),
    );
    let superblock = |c: &Change| matches!(c, Change::Write { file, .. } if file.ends_with("db/superblock"));
    sabotaged_restart(Life::Folding, "a start does not sync the superblock", &superblock, &|c| named(c, "superblock"));
    let renamed = |c: &Change| matches!(c, Change::Rename { .. });
    sabotaged_restart(Life::Folding, "a start does not sync a client's folder", &renamed, &|c| named(c, "store/a"));
    let removed = |c: &Change| matches!(c, Change::Remove(path) if is_segment(path));
    sabotaged_restart(Life::Folding, "a start does not sync the journal's folder", &removed, &|c| named(c, "journal"));
}
