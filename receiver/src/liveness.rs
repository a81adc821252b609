//! When a group's primary was heard from last: a failover while it lives would make a second writer.
//!
//! Always holds: the primary counts as alive for [`ALIVE_WITHIN`] after the last packet of its session, unless it took leave. Whether
//! the session is still open says nothing: a machine that lost its power keeps one until QUIC gives it up. Time in which this node itself stood
//! still, stopped or behind a disk that hangs, says nothing either, and does not count.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::CloseCode;
use proto::control::LEAVE_REASON;
use quinn::{Connection, ConnectionError, VarInt};
use tokio::task::JoinHandle;

use crate::group::Shared;

/// So long after the last packet from it a primary counts as alive. Both sides send a keep-alive every 2 s at least, so this is
/// more than two that got lost.
pub const ALIVE_WITHIN: Duration = Duration::from_secs(5);
/// How often a session's packets are looked at; by so much the age may be too small.
const LOOK_EVERY: Duration = Duration::from_millis(250);

const _: () = assert!(ALIVE_WITHIN.as_millis() > 2 * proto::transport::KEEP_ALIVE.as_millis() + LOOK_EVERY.as_millis());

/// A look that comes so much later than the one before it says that this node stood still: what was sent meanwhile, nobody has looked at.
const STOOD_STILL: Duration = Duration::from_secs(2);
/// What is allowed for a primary to connect again that lost its connection to a node that stood still.
const CONNECTS_AGAIN_WITHIN: Duration = Duration::from_secs(15);

/// The last sign of life of a group's primary since the node was started.
#[derive(Debug, Default)]
pub(crate) struct Heard(Mutex<Signs>);

/// See [`Heard`].
#[derive(Clone, Copy, Debug, Default)]
struct Signs {
    /// The last one, or one that is assumed.
    heard: Option<Instant>,
    /// When the packets of a session that is open were looked at last.
    looked: Option<Instant>,
}

impl Signs {
    /// Its packets are looked at, and there were new ones or not. One that was alive before this node stood still is given the time to be heard again.
    fn look(&mut self, now: Instant, is_new: bool) {
        self.stood_still(now);
        if is_new {
            self.heard = self.heard.max(Some(now));
        }
        self.looked = Some(now);
    }

    /// Nobody looks any more: its session has ended, or another one looks.
    fn end(&mut self, now: Instant) {
        self.stood_still(now);
        self.looked = None;
    }

    /// Its connection may be lost to that, at its side or here, now or in a moment.
    fn stood_still(&mut self, now: Instant) {
        if self.was_alive_before(now) {
            self.heard = Some(now + CONNECTS_AGAIN_WITHIN.saturating_sub(ALIVE_WITHIN));
        }
    }

    /// Whether this node stood still until now, and it was alive before.
    fn was_alive_before(&self, now: Instant) -> bool {
        let late = self.looked.filter(|looked| now.saturating_duration_since(*looked) > STOOD_STILL);
        late.zip(self.heard).is_some_and(|(looked, heard)| looked.saturating_duration_since(heard) < ALIVE_WITHIN)
    }

    /// While nobody looks, nobody grows older.
    fn age(&self, now: Instant) -> Option<Duration> {
        let late = self.looked.filter(|looked| now.saturating_duration_since(*looked) > STOOD_STILL);
        self.heard.map(|heard| late.unwrap_or(now).saturating_duration_since(heard))
    }
}

impl Heard {
    /// It took leave: its guests are off its exports, and what they wrote is committed or known to it.
    pub(crate) fn took_leave(&self) {
        *self.0.lock() = Signs::default();
    }

    /// How long ago that was; `None` if there was none, or it took leave.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.0.lock().age(Instant::now())
    }
}

/// Listens for as long as it is kept.
#[derive(Debug)]
pub(crate) struct Listening(JoinHandle<()>);

impl Listening {
    pub(crate) fn to(connection: Connection, shared: Arc<Shared>) -> Self {
        Self(tokio::spawn(listen(connection, shared)))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // It holds the connection, which ends with its last holder.
        self.0.abort();
    }
}

/// Nobody looks any more, however it ends.
struct Looking(Arc<Shared>);

impl Drop for Looking {
    fn drop(&mut self) {
        self.0.heard.0.lock().end(Instant::now());
    }
}

async fn listen(connection: Connection, shared: Arc<Shared>) {
    let looking = Looking(shared);
    let heard = &looking.0.heard;
    heard.0.lock().look(Instant::now(), true);
    let mut seen = connection.stats().udp_rx.datagrams;
    loop {
        tokio::select! {
            biased;
            end = connection.closed() => {
                if is_leave(&end) {
                    heard.took_leave();
                }
                return;
            }
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let now = connection.stats().udp_rx.datagrams;
        heard.0.lock().look(Instant::now(), now != seen);
        seen = now;
    }
}

/// Whether that is how a primary takes leave.
pub(crate) fn is_leave(end: &ConnectionError) -> bool {
    let stopping = VarInt::from_u32(CloseCode::Stopping as u32);
    matches!(end, ConnectionError::ApplicationClosed(close)
        if close.error_code == stopping && close.reason == LEAVE_REASON.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    /// Looks without a new packet each quarter of a second, from `from` up to `to`.
    fn nothing(signs: &mut Signs, from: Instant, to: Instant) {
        let mut at = from;
        while at <= to {
            signs.look(at, false);
            at += LOOK_EVERY;
        }
    }

    #[test]
    fn silence_counts_and_what_this_node_missed_does_not() {
        let begin = Instant::now();
        let mut signs = Signs::default();
        assert_eq!(signs.age(begin), None);
        signs.look(begin, true);
        nothing(&mut signs, begin, begin + 4 * S);
        assert_eq!(signs.age(begin + 4 * S), Some(4 * S));
        // It stands still for a minute; who asks first sees no silence of a minute.
        assert_eq!(signs.age(begin + 64 * S), Some(4 * S));
        signs.look(begin + 64 * S, false);
        assert_eq!(signs.age(begin + 64 * S), Some(Duration::ZERO), "it has the time to be heard");
        nothing(&mut signs, begin + 64 * S, begin + 80 * S);
        assert_eq!(signs.age(begin + 79 * S), Some(ALIVE_WITHIN), "and was not");
        // Dead already: standing still makes nobody alive.
        assert_eq!(signs.age(begin + 100 * S), Some(6 * S));
        signs.look(begin + 100 * S, false);
        assert!(signs.age(begin + 100 * S) > Some(ALIVE_WITHIN));
        signs.end(begin + 200 * S);
        assert!(signs.age(begin + 200 * S) > Some(ALIVE_WITHIN));
    }

    /// In whatever order it is found out: looked at before the end is seen, with what was still on its way, or not.
    #[test]
    fn a_session_that_was_lost_to_a_standstill_may_come_back() {
        let begin = Instant::now();
        let mut signs = Signs::default();
        signs.look(begin, true);
        let mut lost = signs;
        lost.end(begin + S);
        assert_eq!(lost.age(begin + 6 * S), Some(6 * S), "lost in time: its silence counts");
        for looks in [&[][..], &[false], &[true], &[true, true]] {
            let mut signs = signs;
            looks.iter().for_each(|is_new| signs.look(begin + 30 * S, *is_new));
            signs.end(begin + 30 * S);
            assert!(signs.age(begin + 44 * S) < Some(ALIVE_WITHIN), "{looks:?}");
            assert_eq!(signs.age(begin + 45 * S), Some(ALIVE_WITHIN), "{looks:?}");
        }
    }
}
