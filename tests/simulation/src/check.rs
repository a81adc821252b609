//! What must always hold.
//!
//! - every view equals the image of its cut, whoever crashed;
//! - a point that the primary was told of is there for ever; points only grow;
//! - after a promotion nothing is committed any more;
//! - queues stay within their limits;
//! - when the faults end, everything arrives: the newest point equals the guest's disks.

use std::collections::BTreeMap;

use proto::{Point, SessionToken};

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

    /// Looks at what the receiver has. `all`: every view is read, not only new ones.
    pub(crate) fn check(&mut self, replica: &Replica, group: &str, all: bool) -> Result<(), String> {
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
        for (point, writer) in &self.told {
            if found.get(point) != Some(writer) {
                return Err(format!("point {point} was acknowledged and is not there: {:?}", found.get(point)));
            }
        }
        for (point, writer) in points {
            if !all && self.verified.get(&point) == Some(&writer) {
                continue;
            }
            let Some(images) = self.sealed.get(&(point, writer.0)) else {
                return Err(format!("point {point} was never sealed"));
            };
            let views = replica.views(group, point).map_err(|e| e.to_string())?;
            for (volume, (view, image)) in views.iter().zip(images).enumerate() {
                let mut seen = vec![0; image.len()];
                view.read_now(0, &mut seen).map_err(|e| format!("volume {volume} at {point}: {e}"))?;
                if let Some(at) = seen.iter().zip(image).position(|(a, b)| a != b) {
                    let (have, want) = (seen[at], image[at]);
                    return Err(format!("volume {volume} at {point}: byte {at} is {have}, at the cut it was {want}"));
                }
            }
        }
        self.verified = found;
        Ok(())
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
