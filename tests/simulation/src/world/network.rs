//! What passes between the sites, and how connections come and go.

use proto::SessionToken;
use rand::Rng;

use super::{KEY, World};
use crate::disk::set_tag;
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
        // A handback has its token already.
        let token = primary.handback_line().unwrap_or_else(|| SessionToken(self.rng.random()));
        self.oracle.connected(token);
        self.life.connected(session, primary.hands_back());
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
        self.take_answers()?;
        if self.link.as_ref().is_some_and(Link::is_used_up) {
            self.break_link("it has carried all that it carries")
        } else {
            Ok(())
        }
    }

    /// What the receiver says goes on its way. What it did must be right at once, before anybody hears of it.
    pub(super) fn take_answers(&mut self) -> Result<(), String> {
        let outputs = self.replica.as_mut().map(recovery::Replica::outputs).unwrap_or_default();
        for (session, output) in &outputs {
            if let recovery::Output::Sealing { point, session: token } = output {
                self.sealing(*session, *point, *token)?;
            }
        }
        if self.disk.is_dead() {
            // Nobody heard what it said since it died.
            return self.receiver_falls();
        }
        for (session, output) in outputs {
            let Some(link) = self.link.as_mut().filter(|l| l.session == session) else { continue };
            match output {
                recovery::Output::Control(bytes) => link.answer(&self.path, self.now, &bytes),
                recovery::Output::PassOpen => link.answer_open(),
                recovery::Output::PassData(bytes) => link.answer_data(&self.path, self.now, &bytes),
                recovery::Output::PassEnd => link.answer_end(),
                recovery::Output::Closed { code, reason } => {
                    link.closed = true;
                    self.say(|| format!("the receiver closes: {code} {reason}"));
                }
                recovery::Output::Sealing { .. } => {}
            }
        }
        self.check(false)?;
        self.check_writer()
    }

    /// Bytes reach the primary.
    pub(super) fn answer(&mut self) -> Result<(), String> {
        let (Some(link), Some(primary)) = (&mut self.link, &mut self.primary) else { return Ok(()) };
        if self.path.is_cut(self.now) {
            return Ok(());
        }
        set_tag(Some(primary.tag()));
        let arrived = link.deliver_back(primary, self.now, &mut self.rng);
        if !arrived && link.closed && !link.owes_answer() {
            return self.break_link("closed");
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
                (Output::InBetween { newest, kept }, _) => self.in_between(newest, kept)?,
                (Output::Handed { point, generation }, _) => self.handed(point, generation)?,
                (Output::HandedBack(end), _) => self.handed_back(&end)?,
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
            set_tag(Some(primary.tag()));
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
