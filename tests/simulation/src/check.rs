//! What must always hold.
//!
//! - every view equals the image of its cut, whoever crashed;
//! - a point that the primary was told of is there for ever; points only grow;
//! - after a promotion nothing is committed any more, and nothing of an older session after a newer one's;
//! - a file in which a bit is flipped gives errors that name it, or nothing, never wrong content;
//! - queues stay within their limits;
//! - when the faults end, everything arrives: the newest point equals the guest's disks.

use std::collections::BTreeMap;

use proto::{BLOCK_BYTES, Point, SessionToken};

use crate::recovery::Replica;

/// The images of a group's volumes.
pub(crate) type Images = Vec<Vec<u8>>;

/// What the receiver may show, and what it must.
#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// The image of every epoch that was ever sealed: an epoch may be sealed again by another session.
    sealed: BTreeMap<(Point, [u8; 16]), Images>,
    /// Points that the primary was told of, by the session that cut them.
    told: BTreeMap<Point, SessionToken>,
    /// Newest point seen, and points verified so far.
    verified: BTreeMap<Point, SessionToken>,
    /// Connections in the order in which they were made.
    sessions: BTreeMap<[u8; 16], usize>,
}

impl Oracle {
    pub(crate) fn sealed(&mut self, point: Point, session: SessionToken, images: Images) {
        self.sealed.insert((point, session.0), images);
    }

    /// The primary heard that `point` is committed; the receiver showed it before.
    pub(crate) fn told(&mut self, point: Point) -> Result<(), String> {
        let Some(writer) = self.verified.get(&point) else {
            return Err(format!("point {point} is acknowledged and was never there"));
        };
        self.told.entry(point).or_insert(*writer);
        Ok(())
    }

    /// A connection was made: from here on nothing of a former one may be committed once this one's hello has arrived.
    pub(crate) fn connected(&mut self, session: SessionToken) {
        self.sessions.insert(session.0, self.sessions.len());
    }

    /// Looks at what the receiver has. `all`: every view is read, not only new ones. `damaged`: a file of the journal in which a bit is flipped.
    pub(crate) fn check(&mut self, replica: &Replica, group: &str, all: bool, damaged: Option<&str>) -> Result<(), String> {
        let points = match replica.writers(group) {
            Ok(points) => points,
            // It does not exist before the first hello.
            Err(_) if self.told.is_empty() && self.verified.is_empty() => return Ok(()),
            Err(error) => return Err(format!("the group is gone: {error}")),
        };
        let found: BTreeMap<Point, SessionToken> = points.iter().copied().collect();
        if points.windows(2).any(|w| w[0].0 >= w[1].0) {
            return Err(format!("points out of order: {points:?}"));
        }
        let order = |writer: &SessionToken| self.sessions.get(&writer.0);
        if let Some(w) = points.windows(2).find(|w| order(&w[0].1) > order(&w[1].1)) {
            return Err(format!("point {} was written by an older session than {}", w[1].0, w[0].0));
        }
        for (point, writer) in &self.told {
            if found.get(point) != Some(writer) {
                return Err(format!("point {point} was acknowledged and is not there: {:?}", found.get(point)));
            }
        }
        for (point, writer) in points {
            if all || self.verified.get(&point) != Some(&writer) {
                self.view(replica, group, point, writer, damaged)?;
            }
        }
        self.verified = found;
        Ok(())
    }

    /// What a receiver shows that was started on a copy of the store: less perhaps, but nothing else.
    pub(crate) fn examine(
        &self,
        replica: &Replica,
        group: &str,
        damaged: Option<&str>,
    ) -> Result<BTreeMap<Point, SessionToken>, String> {
        let points = replica.writers(group).map_err(|e| e.to_string())?;
        for (point, writer) in &points {
            self.view(replica, group, *point, *writer, damaged)?;
        }
        Ok(points.into_iter().collect())
    }

    /// Reads the views of a point. With a damaged file, blocks may be errors that name it.
    fn view(
        &self,
        replica: &Replica,
        group: &str,
        point: Point,
        writer: SessionToken,
        damaged: Option<&str>,
    ) -> Result<(), String> {
        let Some(images) = self.sealed.get(&(point, writer.0)) else {
            return Err(format!("point {point} was never sealed"));
        };
        let is_named = |error: &str| damaged.is_some_and(|file| error.contains(file));
        let views = match replica.views(group, point) {
            Ok(views) => views,
            Err(error) if is_named(&error.to_string()) => return Ok(()),
            Err(error) => return Err(error.to_string()),
        };
        for (volume, (view, image)) in views.iter().zip(images).enumerate() {
            // As a whole, and block by block where that is refused.
            let piece = if damaged.is_some() { BLOCK_BYTES as usize } else { image.len() };
            for (number, image) in image.chunks(piece).enumerate() {
                let mut seen = vec![0; image.len()];
                match view.read_now((number * piece) as u64, &mut seen) {
                    Ok(()) => {}
                    Err(error) if is_named(&error.to_string()) => continue,
                    Err(error) => return Err(format!("volume {volume} at {point}: {error}")),
                }
                if let Some(at) = seen.iter().zip(image).position(|(a, b)| a != b) {
                    let (have, want, at) = (seen[at], image[at], number * piece + at);
                    return Err(format!("volume {volume} at {point}: byte {at} is {have}, at the cut it was {want}"));
                }
            }
        }
        Ok(())
    }

    /// The image of a point, as it was verified last.
    pub(crate) fn image(&self, point: Point) -> Option<&Images> {
        self.sealed.get(&(point, self.verified.get(&point)?.0))
    }

    /// The newest point, and the session that cut it.
    pub(crate) fn newest_writer(&self) -> Option<(Point, SessionToken)> {
        self.verified.last_key_value().map(|(point, writer)| (*point, *writer))
    }

    /// The newest point, as it was verified last.
    pub(crate) fn newest(&self) -> Option<(Point, &Images)> {
        let (point, writer) = self.verified.last_key_value()?;
        Some((*point, self.sealed.get(&(*point, writer.0))?))
    }

    pub(crate) fn points(&self) -> usize {
        self.verified.len()
    }
}
