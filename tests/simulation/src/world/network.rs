//! What passes between the sites, and how connections come and go.

use proto::SessionToken;
use rand::Rng;

use super::{KEY, World};
use crate::guest::image;
use crate::link::Link;
use crate::primary::{Output, Primary};
use crate::recovery;

impl World {
    pub(super) fn connect(&mut self) -> Result<(), String> {
        let (Some(primary), Some(replica)) = (&mut self.primary, &mut self.replica) else { return Ok(()) };
        if self.path.is_cut(self.now) {
            self.wanted = false;
            primary.lost(self.now, self.rng.random_range(0.0..1.0), false);
            return self.take_outputs();
        }
        let Some(session) = replica.connect(KEY.parse().map_err(|_| "the key")?) else {
            return Err("the key is not known".to_owned());
        };
        let token = SessionToken(self.rng.random());
        self.oracle.connected(token);
        self.link = Some(Link::new(session, token, &self.path, self.now));
        self.wanted = false;
        primary.connected(self.now, token);
        self.say(|| format!("connected, session {session:?}"));
        self.take_outputs()
    }

    /// Bytes reach the receiver.
    pub(super) fn deliver(&mut self) -> Result<(), String> {
        let Some(replica) = &mut self.replica else { return Ok(()) };
        if self.path.is_cut(self.now) {
            return Ok(());
        }
        // What was under way on a connection that is gone comes in between.
        match (&mut self.link, &mut self.ghost) {
            (_, Some(ghost)) if self.rng.random_bool(0.2) => ghost.deliver(replica, self.now, &mut self.rng),
            (Some(link), _) => link.deliver(replica, self.now, &mut self.rng),
            (None, _) => return Ok(()),
        }
        let outputs = replica.outputs();
        if self.disk.is_dead() {
            // Nobody heard what it said since it died.
            return self.receiver_falls();
        }
        for (session, output) in outputs {
            let link = self.link.as_mut().filter(|l| l.session == session);
            match (output, link) {
                (recovery::Output::Control(bytes), Some(link)) => link.answer(&self.path, self.now, &bytes),
                (recovery::Output::Closed { code, reason }, Some(link)) => {
                    link.closed = true;
                    self.say(|| format!("the receiver closes: {code} {reason}"));
                }
                _ => {}
            }
        }
        // What is committed must be right at once, before anybody hears of it.
        self.check(false)?;
        // The one epoch whose sync failed may turn out to be on the disk after all.
        let doubtful = u64::from(self.sync_failed);
        if let Some(last) = self.promoted
            && self.oracle.newest().is_some_and(|(newest, _)| newest.epoch.0 > last.epoch.0 + doubtful)
        {
            return Err(format!("after the promotion from {last} another point was committed"));
        }
        if self.link.as_ref().is_some_and(Link::is_used_up) {
            self.break_link("it has carried all that it carries")
        } else {
            Ok(())
        }
    }

    /// Bytes reach the primary.
    pub(super) fn answer(&mut self) -> Result<(), String> {
        let (Some(link), Some(primary)) = (&mut self.link, &mut self.primary) else { return Ok(()) };
        if self.path.is_cut(self.now) {
            return Ok(());
        }
        match link.take_answer(self.now, &mut self.rng) {
            Some(bytes) => primary.control(self.now, &bytes),
            None if link.closed && !link.owes_answer() => return self.break_link("closed"),
            None => {}
        }
        self.take_outputs()?;
        if self.link.as_ref().is_some_and(Link::is_used_up) {
            self.break_link("it has carried all that it carries")
        } else {
            Ok(())
        }
    }

    pub(super) fn take_outputs(&mut self) -> Result<(), String> {
        let outputs = self.primary.as_mut().map(Primary::outputs).unwrap_or_default();
        for output in outputs {
            self.say(|| told(&output));
            match (output, &mut self.link) {
                (Output::Connect, _) => self.wanted = true,
                (Output::Control(bytes), Some(link)) => link.send(&self.path, self.now, &bytes),
                (Output::PassOpen, Some(link)) => link.open(),
                (Output::PassData(bytes), Some(link)) => link.data(&self.path, self.now, &bytes),
                (Output::PassEnd, Some(link)) => link.end(),
                (Output::Disconnect, _) => self.forget_link(),
                (Output::Trouble(why), _) => {
                    self.mends_receiver |= why.contains("restart the node") && self.rng.random_bool(0.2);
                }
                (Output::Sealed { point, session, tag }, _) => {
                    let images = image(&self.base, &self.applied.lock(), tag);
                    self.oracle.sealed(point, session, images);
                }
                (Output::Committed(point), _) => {
                    self.oracle.told(point)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The connection is gone for the primary. The receiver learns it now, or only later.
    pub(super) fn forget_link(&mut self) {
        let Some(link) = self.link.take() else { return };
        // Only a receiver that runs can have missed it; the next one counts its sessions anew.
        let missed = self.replica.is_some() && !link.closed && self.rng.random_bool(0.3);
        let gone = if missed { self.ghost.replace(link) } else { Some(link) };
        if let Some(gone) = gone {
            self.receiver_loses(&gone);
        }
    }

    pub(super) fn receiver_loses(&mut self, link: &Link) {
        if let Some(replica) = &mut self.replica {
            replica.lost(link.session);
            let _ = replica.outputs();
        }
    }

    pub(super) fn break_link(&mut self, why: &str) -> Result<(), String> {
        self.say(|| format!("the connection breaks: {why}"));
        self.outcome.broken += 1;
        self.forget_link();
        self.wanted = false;
        if self.disk.is_dead() {
            self.receiver_falls()?;
        }
        let jitter = self.rng.random_range(0.0..1.0);
        if let Some(primary) = &mut self.primary {
            primary.lost(self.now, jitter, false);
        }
        self.take_outputs()
    }
}

/// An output in a line of a trace.
fn told(output: &Output) -> String {
    match output {
        Output::PassData(bytes) => format!("sends {} bytes of the pass", bytes.len()),
        Output::Control(bytes) => format!("sends {} bytes of control", bytes.len()),
        Output::Sealed { point, .. } => format!("sealed {point}"),
        Output::Committed(point) => format!("told that {point} is committed"),
        Output::Trouble(why) => format!("ends the session: {why}"),
        other => format!("{other:?}"),
    }
}
