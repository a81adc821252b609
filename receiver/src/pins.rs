//! Which points somebody looks at.
//!
//! A view pins its point while it lives, and so does whatever holds views: a drill, a fork, an export, a comparison. Always holds: nothing is
//! folded past the oldest pin, because that overwrites what its view reads in the base, and a pinned point is not thinned away. Pins hold these back and
//! nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use proto::Point;

use crate::index::Index;

/// Pins by point, with how many there are.
#[derive(Debug, Default)]
pub(crate) struct Pins(Mutex<BTreeMap<Point, usize>>);

impl Pins {
    /// Pins `point`. To be called while the point cannot be given up: under the lock of the group's state.
    pub(crate) fn pin(self: &Arc<Self>, point: Point) -> Pin {
        *self.0.lock().entry(point).or_default() += 1;
        Pin { pins: Arc::clone(self), point }
    }

    /// The oldest pinned point.
    pub(crate) fn oldest(&self) -> Option<Point> {
        self.0.lock().first_key_value().map(|(point, _)| *point)
    }

    /// All pinned points, oldest first.
    pub(crate) fn all(&self) -> Vec<Point> {
        self.0.lock().keys().copied().collect()
    }
}

/// A point that is not folded away while this lives.
#[derive(Debug)]
pub(crate) struct Pin {
    pins: Arc<Pins>,
    point: Point,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self.pins.0.lock();
        if let Some(count) = pins.get_mut(&self.point) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.point);
            }
        }
    }
}

/// An index whose point stays.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) index: Index,
    /// `None`: of a group without a point, whose views are empty.
    pub(crate) _pin: Option<Pin>,
}
