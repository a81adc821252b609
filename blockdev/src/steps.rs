//! The durable steps of every transition, as points at which a test has the process die.
//!
//! A build with `debug_assertions` looks once at [`DIE_AT`]: the text of a [`Step`], or `text#n` for the `n`th time that it is reached. When
//! it is, the process sends itself SIGKILL. A release build has none of it: [`reach`] is empty there.
//! What must hold: every step of the table is reached by a scenario of `tests/steps.rs`, which fails if one is not. A new transition adds its
//! steps here, a call of [`reach`] behind each, and a scenario there.

/// Name of the environment variable.
pub const DIE_AT: &str = "TWINSITE_DIE_AT";

macro_rules! steps {
    ($($step:ident = $text:literal,)*) => {
        /// A step of a transition, named by what was done last.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Step {
            $(#[doc = $text] $step,)*
        }

        impl Step {
            /// The table.
            pub const ALL: &[Self] = &[$(Self::$step,)*];

            /// What the variable and messages call it.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$step => $text,)*
                }
            }
        }
    };
}

steps! {
    // At the receiver.
    FailoverRecorded = "failover: export address recorded",
    FailoverRaised = "failover: generation raised",
    FailoverForkBuilt = "failover: fork built, without its name",
    FailoverForkNamed = "failover: fork named",
    FailoverForkOpen = "failover: fork open",
    FailoverExported = "failover: disks exported",

    // The first three at the primary.
    SwitchoverAsked = "switchover: primary asked for no more writes",
    SwitchoverRecorded = "switchover: primary has recorded it",
    SwitchoverCommitted = "switchover: primary has committed all of it",
    SwitchoverDrained = "switchover: receiver knows it, not promoted",

    // Failback and rollback, at the primary.
    RollbackParked = "rollback: last writes committed, session ended",
    TakeBegun = "handback: primary has recorded that it begins",
    TakeKept = "handback: own blocks are kept, not recorded",
    TakeKeptRecorded = "handback: own blocks are kept, recorded",
    TakeFrame = "handback: a frame is on the disk",
    TakePass = "handback: a pass is on the disks",
    TakeFlushed = "handback: disks flushed, receiver not told",
    TakeHanded = "handback: primary told, not recorded",
    TakeRecorded = "handback: primary told, recorded",
    TakeOpened = "handback: primary takes writes",

    // The same, at the receiver.
    GiveArrived = "handback: own blocks arrived, without their name",
    GiveNamed = "handback: own blocks named, primary not told",
    GiveClaimed = "handback: group claimed",
    GivePass = "handback: a pass is sent and staged",
    GiveHeld = "handback: guests of the copy are held up",
    GiveApplied = "handback: last pass is at the primary",
    GiveSealed = "handback: point sealed, not handed over",
    GiveHanded = "handback: handed over durably",
    GiveForkRemoved = "handback: fork removed, primary not told",

    FoldBegun = "fold: begun recorded",
    FoldRun = "fold: blocks written into the base",
    FoldWritten = "fold: base complete, not synced",
    FoldSynced = "fold: base synced",
    FoldEnded = "fold: end recorded",
    FoldSegmentRemoved = "fold: a segment removed",

    ThinBuilt = "thin: segment built, without its name",
    ThinNamed = "thin: segment named, folder not synced",
    ThinSynced = "thin: folder synced, what it stands for still there",
    ThinSegmentRemoved = "thin: a segment removed",

    FlattenBegun = "flatten: maps made",
    FlattenPiece = "flatten: a piece copied",
    FlattenSynced = "flatten: copies synced, without their bits",
    FlattenBits = "flatten: bits of copies durable",
    FlattenCopied = "flatten: everything copied, not said so",
    FlattenMarked = "flatten: said to be flat",
    FlattenTouched = "flatten: a region touched, nothing written to it",
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.text())
    }
}

/// A step is done: the process dies here if it was told to.
#[inline]
pub fn reach(step: Step) {
    #[cfg(debug_assertions)]
    armed::reach(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::{DIE_AT, Step};

    struct Armed {
        step: Step,
        /// Times that it is reached before the last.
        left: AtomicU64,
    }

    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

    /// Takes `text` or `text#n` apart.
    pub(super) fn parse(text: &str) -> Option<(Step, u64)> {
        let (name, nth) = match text.rsplit_once('#') {
            Some((name, nth)) => (name, nth.parse().ok().filter(|nth| *nth > 0)?),
            None => (text, 1),
        };
        Step::ALL.iter().find(|step| step.text() == name).map(|step| (*step, nth))
    }

    fn armed() -> Option<Armed> {
        let text = std::env::var(DIE_AT).ok()?;
        let Some((step, nth)) = parse(&text) else {
            eprintln!("{DIE_AT}='{text}': no such step: blockdev/src/steps.rs has the table");
            std::process::exit(2);
        };
        Some(Armed { step, left: AtomicU64::new(nth - 1) })
    }

    pub(super) fn reach(step: Step) {
        let Some(armed) = ARMED.get_or_init(armed).as_ref().filter(|armed| armed.step == step) else { return };
        let earlier = armed.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if earlier.is_ok() {
            return;
        }
        eprintln!("dies at '{step}'");
        let killed = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal is on its way, or nothing is as it should be. This thread goes no further either way.
        assert!(killed.is_ok(), "{killed:?}");
        loop {
            std::thread::park();
        }
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::*;

    /// Would catch two steps of one text, of which a test could reach only the first.
    #[test]
    fn each_step_is_found_by_its_text() {
        for step in Step::ALL {
            assert_eq!(armed::parse(step.text()), Some((*step, 1)));
            assert_eq!(armed::parse(&format!("{step}#3")), Some((*step, 3)));
            for wrong in [format!("{step}#0"), format!("{step}#"), format!("{step} ")] {
                assert_eq!(armed::parse(&wrong), None);
            }
        }
    }
}
