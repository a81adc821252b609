//! An outbox against connections that break anywhere.

use proptest::prelude::*;
use proto::frame::encode_zero;
use proto::pass::PassKind;
use proto::{BlockExtent, BlockIndex, Generation, SessionToken, VolumeIndex};

use super::*;

/// A receiver that remembers what arrived: frames of the epoch that is open, and whole epochs.
#[derive(Default)]
struct Receiver {
    committed: u64,
    pass: Option<PassHeader>,
    frames: Vec<Vec<u8>>,
    /// Frames of each committed epoch.
    epochs: Vec<Vec<Vec<u8>>>,
}

impl Receiver {
    fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for frame in &self.frames {
            tally.add(frame.first_chunk().unwrap(), frame.len(), 0, 1);
        }
        tally
    }

    fn staged(&self) -> Option<Staged> {
        let (epoch, frames) = (EpochId(self.committed + 1), self.frames.len() as u64);
        (frames > 0).then(|| Staged { epoch, frames, digest: self.tally().digest() })
    }

    fn take(&mut self, item: Item) {
        match item {
            Item::Begin(header) => {
                assert_eq!(header.epoch.0, self.committed + 1, "epochs in order");
                assert_eq!(header.continued, self.pass.is_none() && !self.frames.is_empty(), "goes on where it stands");
                self.pass = Some(header);
            }
            Item::Frame(bytes) => {
                let header = proto::FrameHeader::decode(bytes.first_chunk().unwrap()).unwrap();
                let pass = self.pass.expect("a frame is in a pass");
                assert_eq!((header.epoch, header.pass), (pass.epoch, pass.pass));
                self.frames.push(bytes.to_vec());
            }
            Item::End | Item::Query(_) | Item::Scrub(_) | Item::Drained(_) => {}
            Item::Seal(seal) => {
                assert!(self.tally().matches(&seal), "all frames of the epoch, each once");
                self.committed = seal.epoch.0;
                self.epochs.push(std::mem::take(&mut self.frames));
            }
        }
    }
}

fn frame(epoch: u64, pass: u16, block: u64) -> Vec<u8> {
    let extent = BlockExtent { start: BlockIndex(block), blocks: 1 };
    encode_zero(VolumeIndex(0), EpochId(epoch), pass, &[extent])
}

fn seal(epoch: u64, tally: &Tally) -> Item {
    Item::Seal(Box::new(Seal {
        passes: 1,
        epoch: EpochId(epoch),
        generation: Generation(1),
        cut_unix_us: 0,
        frames: tally.frames,
        frame_bytes: tally.frame_bytes,
        data_blocks: tally.data_blocks,
        zero_blocks: tally.zero_blocks,
        first_write_unix_us: 0,
        session: SessionToken::default(),
        digest: tally.digest(),
    }))
}

/// Puts an epoch of these passes (frames of each) into the outbox; returns its frames.
fn put(outbox: &Outbox, epoch: u64, passes: &[usize]) -> Vec<Vec<u8>> {
    let (mut frames, mut tally) = (Vec::new(), Tally::default());
    for (pass, count) in passes.iter().enumerate() {
        let kind = if pass + 1 == passes.len() { PassKind::Frozen } else { PassKind::Fuzzy };
        let header = PassHeader { epoch: EpochId(epoch), pass: pass as u16, kind, continued: false };
        outbox.mark(Item::Begin(header)).unwrap();
        for block in 0..*count {
            let bytes = frame(epoch, pass as u16, block as u64);
            tally.add(bytes.first_chunk().unwrap(), bytes.len(), 0, 1);
            frames.push(bytes.clone());
            futures_util::FutureExt::now_or_never(outbox.frame(bytes, (0, 1))).expect("there is room").unwrap();
        }
        outbox.mark(Item::End).unwrap();
    }
    outbox.mark(seal(epoch, &tally)).unwrap();
    frames
}

proptest! {
    /// However often the connection breaks, and whatever of the answers was heard: every epoch arrives whole, each frame once.
    #[test]
    fn a_line_that_breaks_carries_everything_once(
        epochs in prop::collection::vec(prop::collection::vec(0..6usize, 1..4), 1..5),
        // Marks alone are no progress: as many items as the marks of an epoch, and a frame.
        windows in prop::collection::vec((8..12usize, any::<bool>(), any::<bool>()), 1..40),
    ) {
        let outbox = Outbox::new(0);
        let mut receiver = Receiver::default();
        let sent: Vec<_> = epochs.iter().enumerate().map(|(i, passes)| put(&outbox, i as u64 + 1, passes)).collect();
        let mut windows = windows.iter().cycle();
        for _ in 0..10_000 {
            let (items, hears_staged, hears_commits) = windows.next().unwrap();
            let next = EpochId(receiver.committed + 1);
            prop_assert!(outbox.continues(next, receiver.staged().as_ref()));
            outbox.resume(next, receiver.frames.len() as u64);
            receiver.pass = None;
            for _ in 0..*items {
                let Some(item) = outbox.try_next() else { break };
                receiver.take(item);
            }
            if *hears_commits {
                outbox.committed(EpochId(receiver.committed));
            }
            if *hears_staged {
                let heard = outbox.staged(EpochId(receiver.committed + 1), receiver.frames.len() as u64);
                prop_assert!(heard.is_ok() || !hears_commits, "{heard:?}");
            }
            if receiver.committed == epochs.len() as u64 {
                break;
            }
        }
        prop_assert_eq!(receiver.epochs, sent);
        outbox.committed(EpochId(epochs.len() as u64));
        prop_assert_eq!((outbox.held_bytes(), outbox.unsent_bytes()), (0, 0));
    }
}

/// Would catch a receiver that is believed although it holds something else, or has lost what was dropped here.
#[test]
fn another_part_than_ours_is_not_gone_on_with() {
    let outbox = Outbox::new(0);
    put(&outbox, 1, &[3, 2]);
    put(&outbox, 2, &[2]);
    let mut receiver = Receiver::default();
    for _ in 0..4 {
        receiver.take(outbox.try_next().unwrap());
    }
    let staged = receiver.staged().unwrap();
    assert_eq!(staged.frames, 3);
    assert!(outbox.continues(EpochId(1), Some(&staged)) && outbox.continues(EpochId(1), None));
    assert!(outbox.continues(EpochId(2), None), "a commit that was not heard");
    assert!(!outbox.continues(EpochId(3), Some(&staged)) && !outbox.continues(EpochId(2), Some(&staged)));
    assert!(!outbox.continues(EpochId(4), None), "an epoch that was never sent");
    assert!(!outbox.continues(EpochId(1), Some(&Staged { digest: [1; 32], ..staged })));
    assert!(!outbox.continues(EpochId(1), Some(&Staged { frames: 2, ..staged })));
    assert!(!outbox.continues(EpochId(1), Some(&Staged { frames: 90, ..staged })));
    outbox.staged(EpochId(1), 2).unwrap();
    assert!(outbox.continues(EpochId(1), Some(&staged)));
    assert!(!outbox.continues(EpochId(1), None), "two frames are gone from here");
    outbox.committed(EpochId(1));
    assert!(!outbox.continues(EpochId(1), Some(&staged)), "the receiver fell behind its own commit");
}

/// Would catch a receiver whose word lets go of frames that it never had.
#[test]
fn a_receiver_has_no_more_than_it_was_sent() {
    let outbox = Outbox::new(0);
    put(&outbox, 1, &[3]);
    put(&outbox, 2, &[3]);
    assert!(outbox.staged(EpochId(1), 1).is_err(), "nothing is sent yet");
    for _ in 0..3 {
        outbox.try_next().unwrap();
    }
    assert!(outbox.staged(EpochId(1), 2).is_ok());
    let error = outbox.staged(EpochId(1), 3).unwrap_err().to_string();
    assert_eq!(error, "the receiver says it has 3 frames of epoch 1, it was sent 2 of epoch 1: update the older side");
    assert!(outbox.staged(EpochId(2), 1).is_err());
    outbox.committed(EpochId(1));
    assert!(outbox.staged(EpochId(1), 3).is_ok(), "late, and of no interest any more");
}

/// Frames keep their room until the receiver has them, so that they can be sent again.
#[tokio::test]
async fn room_comes_back_when_the_receiver_has_a_frame() {
    let outbox = Outbox::with_limit(100);
    outbox.mark(Item::Begin(PassHeader { epoch: EpochId(1), pass: 0, kind: PassKind::Frozen, continued: false })).unwrap();
    outbox.frame(vec![0; 60], (0, 1)).await.unwrap();
    let connection = outbox.attach();
    let mut second = Box::pin(outbox.frame(vec![0; 60], (0, 1)));
    assert!(futures_util::poll!(&mut second).is_pending());
    assert!(matches!(
        (outbox.next(connection).await, outbox.next(connection).await),
        (Some(Item::Begin(_)), Some(Item::Frame(_)))
    ));
    assert!(futures_util::poll!(&mut second).is_pending(), "sent is not received");
    outbox.staged(EpochId(1), 1).unwrap();
    second.await.unwrap();
    let mut third = Box::pin(outbox.frame(vec![0; 60], (0, 1)));
    assert!(futures_util::poll!(&mut third).is_pending());
    outbox.close();
    assert!(matches!(third.await, Err(CaptureError::Stopped)));
    assert!(outbox.next(connection).await.is_none());
}

/// Questions are of a connection: one that was not sent is not sent on the next.
#[test]
fn a_question_is_not_asked_twice() {
    let outbox = Outbox::new(0);
    let query = HashQuery { id: 1, volume: VolumeIndex(0), start: BlockIndex(0), blocks: 1, chunk_blocks: 1 };
    outbox.mark(Item::Query(query)).unwrap();
    outbox.mark(Item::Query(query)).unwrap();
    assert!(matches!(outbox.try_next(), Some(Item::Query(_))));
    outbox.resume(EpochId(1), 0);
    assert!(outbox.try_next().is_none());
}

/// Would catch a task of a broken connection that takes what the next one is to send: the receiver would miss it.
#[tokio::test]
async fn a_connection_that_is_gone_takes_nothing() {
    let outbox = Outbox::new(0);
    put(&outbox, 1, &[2]);
    let gone = outbox.attach();
    assert!(matches!(outbox.next(gone).await, Some(Item::Begin(_))));
    outbox.resume(EpochId(1), 0);
    let connection = outbox.attach();
    assert!(outbox.next(gone).await.is_none());
    assert!(matches!(outbox.next(connection).await, Some(Item::Begin(_))));
}
