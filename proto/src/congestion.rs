//! Congestion control: CUBIC that does not take every loss for congestion.
//!
//! CUBIC divides its window at every loss, so a path that loses 1 % of its packets for other reasons (radio, a bad line, a policer's
//! neighbour) carries `1.2 · 1452 / (0.08 · √0.01)` bytes a second at a round trip of 80 ms: 1.8 Mbit/s, whatever its rate is. Here a loss
//! counts only with a second sign: packets wait in a queue, or more are lost than a path loses by itself. The first is TCP Veno's
//! test (Fu and Liew, 2003), the second the bound of BBRv2, without which a path that has a policer and no queue would be overrun.
//!
//! `quinn`'s BBR is no alternative: its estimate of the bandwidth never falls, and its authors call it experimental.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory, ControllerMetrics, Cubic, CubicConfig};

/// A queue is seen when the round trip takes longer than the shortest one by this part of it, ...
const QUEUE_SHARE: u32 = 4;
/// ... and by this time at least: less is what timers and busy machines do.
const QUEUE_MIN: Duration = Duration::from_millis(5);
/// Losses beyond this share count in any case.
const LOSS_PERCENT_MAX: u64 = 3;
/// Bytes after which what was counted weighs half: some 700 full packets, so that 1 % is not taken for 3 % by chance.
const COUNTED_BYTES: u64 = 1 << 20;

/// Tells losses of congestion from others.
#[derive(Clone, Debug, Default)]
struct Judge {
    acked_bytes: u64,
    lost_bytes: u64,
    shortest: Duration,
    usual: Duration,
}

impl Judge {
    /// `shortest` and `usual` are the connection's round trip.
    fn acked(&mut self, bytes: u64, shortest: Duration, usual: Duration) {
        (self.shortest, self.usual) = (shortest, usual);
        self.acked_bytes += bytes;
        if self.acked_bytes + self.lost_bytes > COUNTED_BYTES {
            self.acked_bytes /= 2;
            self.lost_bytes /= 2;
        }
    }

    /// Whether a loss of `bytes`, after all others, is one of congestion.
    fn lost(&mut self, bytes: u64) -> bool {
        self.lost_bytes += bytes;
        let queue = self.usual.saturating_sub(self.shortest) > (self.shortest / QUEUE_SHARE).max(QUEUE_MIN);
        // A few of the first packets say nothing about the path's share.
        let counted = (self.acked_bytes + self.lost_bytes).max(COUNTED_BYTES / 2);
        queue || self.lost_bytes * 100 > counted * LOSS_PERCENT_MAX
    }
}

/// The controller of one path.
#[derive(Clone, Debug)]
pub struct Tolerant {
    cubic: Cubic,
    judge: Judge,
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.judge.acked(bytes, rtt.min(), rtt.get());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    /// A router that marks packets (no bytes are lost) and a path that is silent speak for themselves.
    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        if self.judge.lost(lost_bytes) || is_persistent_congestion || lost_bytes == 0 {
            self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Makes [`Tolerant`] controllers.
#[derive(Clone, Debug, Default)]
pub struct TolerantConfig(Arc<CubicConfig>);

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant { cubic: Cubic::new(Arc::clone(&self.0), now, current_mtu), judge: Judge::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const PACKET: u64 = 1452;

    /// Every `n`th packet is lost; how many of the losses count.
    fn counted(n: u64, shortest: Duration, usual: Duration) -> u64 {
        let mut judge = Judge::default();
        let mut counted = 0;
        for packet in 1..=10_000 {
            if packet % n == 0 {
                counted += u64::from(judge.lost(PACKET));
            } else {
                judge.acked(PACKET, shortest, usual);
            }
        }
        counted
    }

    /// Would catch a path that is left alone although it is full, and one that is left unused although it is not.
    #[test]
    fn a_loss_counts_with_a_queue_or_with_many_others() {
        assert_eq!(counted(100, 80 * MS, 85 * MS), 0, "1 % without a queue");
        assert_eq!(counted(40, 80 * MS, 100 * MS), 0, "2.5 %, at the edge of a queue");
        assert_eq!(counted(100, 80 * MS, 101 * MS), 100, "1 % with a queue");
        assert_eq!(counted(100, MS, 5 * MS), 0, "a short path's jitter");
        assert_eq!(counted(100, MS, 7 * MS), 100, "a short path's queue");
        assert!(counted(25, 80 * MS, 80 * MS) > 380, "4 % in any case: {}", counted(25, 80 * MS, 80 * MS));
    }

    /// Would catch a burst of losses that is remembered for ever, and one that is forgotten at once.
    #[test]
    fn a_burst_counts_and_is_forgotten() {
        let mut judge = Judge::default();
        (0..2000).for_each(|_| judge.acked(PACKET, 80 * MS, 80 * MS));
        let burst = (0..100).filter(|_| judge.lost(PACKET)).count();
        assert!((70..=90).contains(&burst), "{burst} of 100 count");
        (0..500).for_each(|_| judge.acked(PACKET, 80 * MS, 80 * MS));
        assert!(judge.lost(PACKET), "still within what is counted");
        (0..4000).for_each(|_| judge.acked(PACKET, 80 * MS, 80 * MS));
        assert!(!judge.lost(PACKET));
    }

    /// Would catch marks of a router, silence, or congestion that do not reach CUBIC, and a loss that does.
    #[test]
    fn what_counts_reaches_cubic() {
        let now = Instant::now();
        let window_after = |persistent, lost_bytes| {
            let mut controller = Arc::new(TolerantConfig::default()).build(now, 1452);
            let before = controller.window();
            controller.on_congestion_event(now, now, persistent, lost_bytes);
            controller.window() as f64 / before as f64
        };
        assert_eq!(window_after(false, PACKET), 1.0);
        assert!(window_after(false, 0) < 0.8);
        assert!(window_after(true, PACKET) < 0.5);
        assert!(window_after(false, 100 * PACKET) < 0.8);
    }
}
