//! Taking disks back, one step at a time: what `handback::conversation` is in the daemon.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use blockdev::{ArrivedFrame, FrameReader, read_blocks};
use parking_lot::Mutex;
use proto::frame::FRAME_HEADER_BYTES;
use proto::pack::{GroupPacker, Packed, Wanted};
use proto::pass::{PASS_HEADER_BYTES, PassHeader};
use proto::seal::Tally;
use proto::units::blocks_of;
use proto::{DirtyMap, Hashes, Message, Name, Point, SessionToken, VolumeIndex};
use tokio::sync::mpsc;

use super::{Done, Output, Owner, Primary, Task, finish};
use crate::HandbackTarget;
use crate::capture::CaptureError;
use crate::compare::Compare;
use crate::gate::Closed;
use crate::handback::Broken;
use crate::handback::core::{Action, Core, Event, Wish};
use crate::outbox::{Item, Outbox};
use crate::record::Stopped;

/// A pass on its way here.
#[derive(Debug, Default)]
struct Incoming {
    header: Vec<u8>,
    unread: VecDeque<Vec<u8>>,
    ended: bool,
}

/// A handback that is under way.
pub(super) struct Handing {
    core: Core,
    /// A connection is wanted, or stands.
    line: bool,
    control: Vec<u8>,
    passes: VecDeque<Incoming>,
    /// A pass is to come.
    takes: bool,
    /// The pass at the front is being written.
    reader: Option<FrameReader>,
    writing: usize,
    /// What guests' writes are waited for.
    settles: Option<bool>,
    comparing: Option<(Outbox, mpsc::Sender<Hashes>)>,
    /// Frames of own blocks that were packed.
    own: Arc<Mutex<Vec<(VolumeIndex, Packed)>>>,
    tally: Tally,
    /// Bytes of blocks that were written, and bytes of frames.
    moved_bytes: u64,
    kept: Option<Name>,
}

/// How a handback ended.
#[derive(Clone, Debug)]
pub struct HandbackEnd {
    /// The point that both sites hold, or why not.
    pub point: Result<Point, String>,
    /// Bytes of blocks that were written here.
    pub moved_bytes: u64,
    /// The fork that keeps what was written here of its own.
    pub kept: Option<Name>,
}

impl Primary {
    /// Begins to take the disks back (`None`), or to go back to a point.
    ///
    /// # Errors
    /// Why it may not begin.
    pub fn hand_back(&mut self, now: Instant, to: Option<Point>, token: SessionToken) -> Result<(), &'static str> {
        let recorded = self.handback_token();
        if self.handing.is_some() {
            return Err("one is under way");
        }
        match to {
            _ if recorded.is_some() => {}
            None if self.is_fenced() => {}
            Some(_) if self.core.follows() => {}
            None => return Err("it is not fenced"),
            Some(_) => return Err("it does not follow"),
        }
        let (token, kept) = recorded.unwrap_or((token, false));
        let newest = self.record.lock().newest.clone();
        let wish = Wish {
            target: to.map_or(HandbackTarget::Failback, HandbackTarget::Rollback),
            plans: false,
            named: None,
            group: self.group.clone(),
            generation: newest.generation,
            volumes: self.hellos.clone(),
            token,
            repeats: recorded.is_some(),
            kept,
            gate: self.gate.closed(),
            cleared: newest.cleared.max(self.ledger.summary().committed),
        };
        self.handing = Some(Box::new(Handing {
            core: Core::new(wish),
            line: false,
            control: Vec::new(),
            passes: VecDeque::new(),
            takes: false,
            reader: None,
            writing: 0,
            settles: None,
            comparing: None,
            own: Arc::default(),
            tally: Tally::default(),
            moved_bytes: 0,
            kept: None,
        }));
        self.handback_event(now, Event::Begin);
        Ok(())
    }

    pub(super) fn handback_token(&self) -> Option<(SessionToken, bool)> {
        match self.record.lock().newest.stopped {
            Some(Stopped::Handback { token, kept, .. }) => Some((token, kept)),
            _ => None,
        }
    }

    /// Whether a handback is under way.
    #[must_use]
    pub fn hands_back(&self) -> bool {
        self.handing.is_some()
    }

    /// The token of the handback whose connection is wanted, or stands.
    #[must_use]
    pub fn handback_line(&self) -> Option<SessionToken> {
        self.handing.as_ref().filter(|h| h.line).map(|h| h.core.wish().token)
    }

    /// The disks are neither what they were nor what they are to be, and a handback is to be repeated.
    #[must_use]
    pub fn is_in_between(&self) -> bool {
        self.handback_token().is_some()
    }

    /// The receiver opens the next stream.
    pub fn pass_open(&mut self) {
        if let Some(handing) = &mut self.handing {
            handing.passes.push_back(Incoming::default());
        }
    }

    /// Bytes of a stream, in pieces of any size; `stream` counts those whose end was not told yet.
    pub fn pass_data(&mut self, now: Instant, stream: usize, bytes: &[u8]) {
        if let Some(pass) = self.handing.as_mut().and_then(|h| h.passes.iter_mut().filter(|p| !p.ended).nth(stream)) {
            pass.unread.push_back(bytes.to_owned());
            self.read_passes(now);
        }
    }

    /// That stream is complete.
    pub fn pass_end(&mut self, now: Instant, stream: usize) {
        if let Some(pass) = self.handing.as_mut().and_then(|h| h.passes.iter_mut().filter(|p| !p.ended).nth(stream)) {
            pass.ended = true;
            self.read_passes(now);
        }
    }

    pub(super) fn handback_connected(&mut self, now: Instant) {
        self.handback_event(now, Event::Connected);
    }

    pub(super) fn handback_lost(&mut self, now: Instant) {
        self.handback_fails(now, &Broken::Lost("the connection is gone".to_owned()));
    }

    pub(super) fn handback_control(&mut self, now: Instant, bytes: &[u8]) {
        let Some(handing) = &mut self.handing else { return };
        handing.control.extend_from_slice(bytes);
        while let Some(handing) = &mut self.handing {
            let Some((prefix, rest)) = handing.control.split_first_chunk::<4>() else { return };
            let length = Message::check_length(*prefix).expect("the receiver keeps the rules");
            let Some(body) = rest.get(..length) else { return };
            let message = Message::decode(body).expect("the receiver keeps the rules");
            handing.control.drain(..4 + length);
            self.handback_event(now, Event::Message(message));
        }
    }

    /// Time passed, or a write was done.
    pub(super) fn handback_looks(&mut self, now: Instant) {
        let Some(handing) = &self.handing else { return };
        let is_due = handing.core.deadline().is_some_and(|deadline| now >= deadline);
        if let Some(committed) = handing.settles
            && self.ledger.is_quiet()
            && (!committed || self.ledger.summary().uncommitted_bytes == 0 && self.core.follows())
        {
            self.hurry = false;
            if let Some(handing) = &mut self.handing {
                handing.settles = None;
            }
            return self.handback_event(now, Event::Settled);
        }
        if is_due {
            self.handback_event(now, Event::Tick);
        }
    }

    /// Hands over what tasks have made.
    pub(super) fn handback_collect(&mut self) {
        let Some(handing) = &mut self.handing else { return };
        if let Some((queue, _)) = &handing.comparing {
            while let Some(Item::Query(query)) = queue.try_next() {
                self.outputs.push_back(Output::Control(Message::HashQuery(query).encode()));
            }
        }
        for (_, Packed { bytes, data_blocks, zero_blocks, .. }) in handing.own.lock().drain(..) {
            if let Some(head) = bytes.first_chunk::<FRAME_HEADER_BYTES>() {
                handing.tally.add(head, bytes.len(), data_blocks, zero_blocks);
            }
            self.outputs.push_back(Output::PassData(bytes));
        }
    }

    pub(super) fn handback_compared(&mut self, now: Instant, done: Result<(), CaptureError>) {
        if let Some(handing) = &mut self.handing {
            handing.comparing = None;
        }
        match done {
            Ok(()) => self.handback_event(now, Event::Compared(self.ledger.marked())),
            Err(error @ (CaptureError::Answer { .. } | CaptureError::ScrubAnswer { .. })) => panic!("{error}"),
            Err(error) => self.handback_fails(now, &error.into()),
        }
    }

    pub(super) fn handback_sent(&mut self, now: Instant, done: io::Result<()>) {
        self.handback_collect();
        let Some(handing) = &mut self.handing else { return };
        match done {
            Ok(()) => {
                let (frames, digest) = (handing.tally.frames, handing.tally.digest());
                self.outputs.push_back(Output::PassEnd);
                self.handback_event(now, Event::Sent { frames, digest });
            }
            Err(error) => self.handback_fails(now, &error.into()),
        }
    }

    pub(super) fn handback_applied(&mut self, now: Instant, done: io::Result<u64>) {
        let Some(handing) = &mut self.handing else { return };
        handing.writing -= 1;
        match done {
            Ok(bytes) => {
                handing.moved_bytes += bytes;
                self.read_passes(now);
            }
            Err(error) => self.handback_fails(now, &error.into()),
        }
    }

    /// Reads what has come of the pass at the front.
    fn read_passes(&mut self, now: Instant) {
        loop {
            let Some(handing) = &mut self.handing else { return };
            let Some(pass) = handing.passes.front_mut() else { return };
            if handing.takes {
                while pass.header.len() < PASS_HEADER_BYTES
                    && let Some(bytes) = pass.unread.front_mut()
                {
                    let taken = bytes.len().min(PASS_HEADER_BYTES - pass.header.len());
                    pass.header.extend(bytes.drain(..taken));
                    if bytes.is_empty() {
                        pass.unread.pop_front();
                    }
                }
                let Some(header) = pass.header.first_chunk::<PASS_HEADER_BYTES>() else { return };
                let header = PassHeader::decode(header).expect("the receiver keeps the rules");
                handing.takes = false;
                self.handback_event(now, Event::Pass(header));
                continue;
            }
            let Some(reader) = &mut handing.reader else { return };
            if let Some(bytes) = pass.unread.pop_front() {
                let (mut rest, mut frames) = (bytes.as_slice(), Vec::new());
                while let Some(frame) = reader.take(&mut rest).expect("the receiver keeps the rules") {
                    frames.push(frame);
                }
                handing.writing += frames.len();
                frames.into_iter().for_each(|frame| self.write_frame(frame));
                continue;
            }
            if !pass.ended || handing.writing > 0 {
                return;
            }
            reader.end().expect("the receiver sends whole frames");
            handing.passes.pop_front();
            handing.reader = None;
            self.handback_event(now, Event::Applied);
        }
    }

    fn write_frame(&mut self, frame: ArrivedFrame) {
        let tap = self.inner[frame.volume()].clone();
        let written = async move { Done::Applied(frame.apply(&*tap).await.map(|()| frame.block_bytes())) };
        self.tasks.push(Task { owner: Owner::Handback, writes: true, future: Box::pin(written) });
    }

    fn handback_event(&mut self, now: Instant, event: Event) {
        let Some(handing) = &mut self.handing else { return };
        let mut actions = Vec::new();
        if let Err(error) = handing.core.handle(now, event, &mut actions) {
            return self.handback_fails(now, &error);
        }
        let mut answer = None;
        for action in actions {
            match self.handback_perform(now, action) {
                Ok(event) => answer = event.or(answer),
                Err(error) => return self.handback_fails(now, &error),
            }
        }
        self.handback_collect();
        if let Some(handing) = self.handing.take_if(|handing| handing.core.is_done()) {
            let Handing { core, moved_bytes, kept, .. } = *handing;
            let point = core.handed().map(|(point, _)| point).ok_or_else(|| "it ended without a point".to_owned());
            self.outputs.push_back(Output::HandedBack(HandbackEnd { point, moved_bytes, kept }));
        } else if let Some(event) = answer {
            self.handback_event(now, event);
        } else {
            // Another pass may have come already.
            self.read_passes(now);
        }
    }

    /// It is over; what is being written comes to its end first.
    fn handback_fails(&mut self, now: Instant, why: &Broken) {
        let Some(mut handing) = self.handing.take() else { return };
        let is_ours = |task: &Task| task.owner == Owner::Handback;
        let (ours, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.tasks).into_iter().partition(is_ours);
        self.tasks = others;
        for task in ours.into_iter().filter(|task| task.writes) {
            if let Done::Applied(Ok(bytes)) = finish(task.future) {
                handing.moved_bytes += bytes;
            }
        }
        self.hurry = false;
        if handing.line {
            self.outputs.push_back(Output::Disconnect);
        }
        let mut actions = Vec::new();
        handing.core.fail(self.handback_token().is_some(), &mut actions);
        for action in actions {
            let ended = self.handback_perform(now, action);
            debug_assert!(ended.is_ok(), "the end of a handback needs no disk");
        }
        let (point, kept) = (Err(why.to_string()), handing.kept);
        self.outputs.push_back(Output::HandedBack(HandbackEnd { point, moved_bytes: handing.moved_bytes, kept }));
    }

    fn handback_perform(&mut self, now: Instant, action: Action) -> Result<Option<Event>, Broken> {
        let wish = self.handing.as_ref().map(|h| h.core.wish());
        let (token, to) = wish.map_or_else(Default::default, |wish| (wish.token, wish.target.point()));
        match (action, &mut self.handing) {
            (Action::Step(_) | Action::Total(_), _) => {}
            (Action::CloseGate, _) => self.gate.close(Closed::Handback),
            (Action::OpenGate, _) => self.gate.open(),
            (Action::RestoreGate(was), _) => {
                let stopped = self.record.lock().newest.stopped;
                match stopped.and_then(|stopped| stopped.holds_up(false)).or(was) {
                    Some(why) => self.gate.close(why),
                    None => self.gate.open(),
                }
            }
            (Action::Park, _) => {
                self.disconnect();
                self.outputs.push_back(Output::Disconnect);
                self.give_up();
                self.ledger.merge_sealed();
                self.core.park();
                self.draining = false;
                return Ok(Some(Event::Parked));
            }
            (Action::Unpark, _) => {
                let recorded = self.record.lock().newest.clone();
                self.ledger.accept_flushes();
                self.core.begin(now, recorded.generation, recorded.ours());
                self.outbox.close();
                self.outbox = Outbox::with_limit(self.limit_bytes);
            }
            (Action::Send(message), _) => self.outputs.push_back(Output::Control(message.encode())),
            (Action::Record { kept }, handing) => {
                self.record.lock().change(|record| record.stopped = Some(Stopped::Handback { token, kept, to }));
                let newest = handing.as_ref().and_then(|handing| handing.core.ready()).map(|ready| ready.newest);
                self.outputs.extend(newest.map(|newest| Output::InBetween { newest, kept }));
            }
            (Action::Flush, _) => {
                for device in &self.disks.volumes {
                    finish(device.flush())?;
                }
            }
            (Action::Handed { point, generation, compares }, _) => {
                self.record.lock().change(|record| {
                    record.handed(generation, token);
                });
                match compares {
                    true => self.ledger.suspect_marks(),
                    false => self.ledger.handed(point),
                }
                self.outputs.push_back(Output::Handed { point, generation });
            }
            (Action::End, _) => self.outputs.push_back(Output::Disconnect),
            (_, None) => {}
            (Action::Settle { committed }, Some(handing)) => {
                handing.settles = Some(committed);
                self.hurry = committed;
            }
            (Action::Connect, Some(handing)) => {
                handing.line = true;
                self.outputs.push_back(Output::Connect);
            }
            (Action::SuspectAll, _) => self.ledger.suspect_all(),
            (Action::Compare, Some(handing)) => {
                let queue = Outbox::with_limit(1);
                let (sender, answers) = mpsc::channel(proto::hashes::QUERIES_IN_FLIGHT_MAX);
                handing.comparing = Some((queue.clone(), sender));
                self.ledger.suspect_marks();
                let (ledger, devices, counters) = (self.ledger.clone(), self.disks.volumes.clone(), self.compared.clone());
                self.spawn(Owner::Handback, async move {
                    let compare = Compare { ledger: &ledger, devices: &devices, queue: &queue, answers, counters: &counters };
                    Done::HandbackCompared(compare.run().await)
                });
            }
            (Action::Answer(hashes), Some(handing)) => {
                if let Some((_, answers)) = &handing.comparing {
                    let _ = answers.try_send(hashes);
                }
            }
            (Action::SendOwn(own), Some(handing)) => {
                let newest = handing.core.ready().map(|ready| ready.newest);
                let frames = handing.own.clone();
                self.outputs.push_back(Output::PassOpen);
                let devices = self.disks.volumes.clone();
                let epoch = newest.map_or_else(Default::default, |newest| newest.epoch);
                self.spawn(Owner::Handback, async move { Done::OwnSent(pack(own, &devices, epoch, &frames).await) });
            }
            (Action::Kept(name), Some(handing)) => handing.kept = Some(name),
            (Action::TakePass, Some(handing)) => handing.takes = true,
            (Action::Apply, Some(handing)) => {
                handing.reader = Some(FrameReader::new(self.disks.volumes.iter().map(|d| blocks_of(d.size()))));
            }
        }
        Ok(None)
    }
}

/// Packs blocks of the disks as they are.
async fn pack(
    own: Vec<DirtyMap>,
    devices: &[Arc<dyn blockdev::BlockDevice>],
    epoch: proto::EpochId,
    frames: &Mutex<Vec<(VolumeIndex, Packed)>>,
) -> io::Result<()> {
    let mut packer = GroupPacker::new(own, epoch, 0);
    while let Some(Wanted { volume, runs }) = packer.wanted() {
        for run in runs {
            let content = read_blocks(&*devices[usize::from(volume.0)], run).await?;
            packer.put(volume, run, &content, &mut frames.lock());
        }
    }
    packer.finish(&mut frames.lock());
    Ok(())
}
