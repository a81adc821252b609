//! What the demo found, for people and as JSON.

use proto::{Generation, Point};
use serde::Serialize;

use super::verify::Verdict;
use crate::cli::human::{Paint, bar, bytes, ms};

const BAR_WIDTH: usize = 40;
const BUCKETS: usize = 8;

/// Figures of a run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Whether everything verified.
    pub(super) verified: bool,
    /// What did not.
    pub(super) violations: Vec<String>,
    /// How many there are.
    pub(super) violation_count: u64,
    pub(super) disk_bytes: u64,
    pub(super) interval_ms: u64,
    pub(super) first_sync_ms: u64,
    pub(super) writes_acknowledged: u64,
    /// Acknowledged before the point's cut: all of these must be in the copy.
    pub(super) writes_acknowledged_before_cut: u64,
    pub(super) blocks_compared: u64,
    /// What a disaster at this moment cost.
    pub(super) writes_lost: u64,
    /// From the cut to the kill.
    pub(super) recovery_point_ms: u64,
    pub(super) point: Point,
    pub(super) generation: Generation,
    /// From starting the command to the first bytes read from the copy.
    pub(super) activate_ms: u64,
    pub(super) captured_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) saved_percent: f64,
    pub(super) lag: Lag,
}

/// The lag, sampled every 50 ms from the first commit to the kill.
#[derive(Debug, Serialize)]
pub(super) struct Lag {
    pub(super) samples: usize,
    pub(super) p50_ms: u64,
    pub(super) p99_ms: u64,
    pub(super) max_ms: u64,
    /// Upper bound in ms and number of samples.
    pub(super) histogram: Vec<(u64, usize)>,
}

impl Lag {
    pub(super) fn of(mut samples: Vec<u64>) -> Self {
        samples.sort_unstable();
        let at = |q: usize| samples.get((samples.len() * q / 100).min(samples.len().saturating_sub(1))).copied().unwrap_or(0);
        let max = samples.last().copied().unwrap_or(0);
        let width = nice(max.div_ceil(BUCKETS as u64).max(1));
        let mut histogram: Vec<(u64, usize)> = (1..=max / width + 1).map(|i| (i * width, 0)).collect();
        for sample in &samples {
            if let Some(bucket) = histogram.get_mut((sample / width) as usize) {
                bucket.1 += 1;
            }
        }
        Self { samples: samples.len(), p50_ms: at(50), p99_ms: at(99), max_ms: max, histogram }
    }
}

/// The next of 1, 2, 5, 10, 20, 50, …
fn nice(n: u64) -> u64 {
    let mut scale = 1;
    loop {
        for step in [1, 2, 5] {
            if step * scale >= n {
                return step * scale;
            }
        }
        scale *= 10;
    }
}

impl Report {
    pub(super) fn take_verdict(&mut self, verdict: Verdict) {
        self.verified = verdict.violations.count == 0;
        self.violation_count = verdict.violations.count;
        self.violations = verdict.violations.told;
        self.writes_acknowledged = verdict.acknowledged;
        self.writes_acknowledged_before_cut = verdict.acknowledged_before_cut;
        self.writes_lost = verdict.acknowledged.saturating_sub(verdict.contained);
        self.blocks_compared = verdict.blocks;
    }

    pub(super) fn print(&self, paint: Paint) {
        let line = |label: &str, text: String| println!("  {label:<14} {text}");
        println!("\n{}", paint.bold("Report"));
        if self.verified {
            line("verdict", paint.good("everything verified"));
        } else {
            line("verdict", paint.bad(&format!("{} violations", self.violation_count)));
            self.violations.iter().for_each(|v| line("", v.clone()));
        }
        line("disk", format!("{}, one epoch every {}", bytes(self.disk_bytes), ms(self.interval_ms)));
        line("first sync", format!("{}, under load", ms(self.first_sync_ms)));
        line("load", format!("{} writes of 4 KiB acknowledged", self.writes_acknowledged));
        line("disaster", format!("primary killed {} after the cut of point {}", ms(self.recovery_point_ms), self.point));
        let first = "from the command to the first bytes read";
        line("activated", format!("after {}, {first}; generation {}", ms(self.activate_ms), self.generation));
        let before = self.writes_acknowledged_before_cut;
        line(
            "verified",
            format!("{before} writes acknowledged before the cut: {}", if self.verified { "all there" } else { "see above" }),
        );
        line("", format!("{} blocks compared, their order checked", self.blocks_compared));
        line("not in it", format!("{} writes of the last {}", self.writes_lost, ms(self.recovery_point_ms)));
        let (captured, sent) = (bytes(self.captured_bytes), bytes(self.sent_bytes));
        line(
            "wire",
            format!(
                "{captured} of changed blocks, {sent} sent: {:.1} % saved (half of each block is random)",
                self.saved_percent
            ),
        );
        let Lag { p50_ms, p99_ms, max_ms, samples, .. } = &self.lag;
        line("lag", format!("p50 {}, p99 {}, largest {} ({samples} samples)", ms(*p50_ms), ms(*p99_ms), ms(*max_ms)));
        let most = self.lag.histogram.iter().map(|(_, n)| *n).max().unwrap_or(0) as u64;
        for (bound, n) in &self.lag.histogram {
            let drawn = bar(*n as u64, most.max(1), BAR_WIDTH).replace(['[', ']', '.'], "");
            line("", format!("{:>9}  {drawn} {n}", format!("< {}", ms(*bound))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_in_the_histogram() {
        let lag = Lag::of((0..1000).collect());
        assert_eq!((lag.p50_ms, lag.p99_ms, lag.max_ms), (500, 990, 999));
        assert_eq!(lag.histogram.iter().map(|(_, n)| n).sum::<usize>(), 1000);
        assert_eq!(lag.histogram.first(), Some(&(200, 200)));
        let none = Lag::of(Vec::new());
        assert_eq!((none.samples, none.max_ms), (0, 0));
        assert_eq!(nice(1), 1);
        assert_eq!(nice(1100_u64.div_ceil(8)), 200);
    }
}
