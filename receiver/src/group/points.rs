//! The points of a group for those who look: their names, their indexes, and the walk of the journal that makes one.
//!
//! What must hold: a point that is looked at is pinned before anybody can give it up, and no segment is given up while somebody walks.

use std::sync::Arc;

use proto::codec::DecodeError;
use proto::{BlockExtent, FrameHeader, FrameKind, Name, Point};

use super::stage::Stage;
use super::{Beginning, GroupError, PointEntry, Shared};
use crate::frames::FrameError;
use crate::index::{FrameId, Index};
use crate::journal::{Expected, Item, JournalError, Payloads, Walker, segment_path};
use crate::pins::Pinned;

impl Shared {
    /// Names a point: it stays until the name is taken away.
    pub(crate) fn name_point(&self, point: Point, name: &Name) -> Result<(), GroupError> {
        let mut holds = || self.state.read().points.binary_search_by_key(&point, |p| p.point).is_ok();
        if self.names.set(&self.disk, name, point, &mut holds)? {
            return Ok(());
        }
        Err(GroupError::NoPoint { group: self.folder.group.clone(), point })
    }

    /// What the journal must fit that begins there.
    pub(crate) fn expected(&self, beginning: Beginning) -> Expected {
        Expected {
            group_id: self.group_id,
            first_segment: beginning.first_segment,
            base: beginning.base,
            volume_blocks: Arc::clone(&self.volume_blocks),
        }
    }

    /// The index of the newest point.
    pub(crate) fn newest(&self) -> Pinned {
        let state = self.state.read();
        Pinned { index: state.index.clone(), _pin: state.points.last().map(|p| self.pins.pin(p.point)) }
    }

    /// The index at `point`: at once for the newest and for that of the base, else by walking the journal's headers up to it.
    pub(crate) fn index_at(&self, point: Point) -> Result<Pinned, GroupError> {
        let _walk = self.walks.read();
        let (entry, pin, beginning) = {
            let state = self.state.read();
            let i = state.points.binary_search_by_key(&point, |p| p.point).ok();
            let Some(entry) = i.and_then(|i| state.points.get(i)).copied() else {
                return Err(GroupError::NoPoint { group: self.folder.group.clone(), point });
            };
            let pin = Some(self.pins.pin(point));
            if state.points.last().is_some_and(|p| p.point == point) {
                return Ok(Pinned { index: state.index.clone(), _pin: pin });
            }
            (entry, pin, state.beginning)
        };
        let mut index = Index::new(self.volumes.iter().map(|v| v.size_bytes), beginning.base.is_none());
        if beginning.base != Some(point) {
            let mut stage = Stage::default();
            self.walk(&entry, beginning, &mut |frame| {
                stage.add(&index, (frame.header.volume, frame.header.kind, frame.id), frame.extents);
                Ok(())
            })?;
            stage.seal(&mut index);
        }
        Ok(Pinned { index, _pin: pin })
    }

    /// Walks the journal up to a point, frame by frame with the numbers that they have in the table. The caller sees to it that no segment is given up
    /// or replaced meanwhile.
    pub(super) fn walk(
        &self,
        to: &PointEntry,
        beginning: Beginning,
        frame: &mut dyn FnMut(Walked<'_>) -> Result<(), GroupError>,
    ) -> Result<(), GroupError> {
        let folder = self.folder.journal();
        let list = |source| JournalError::Io { path: folder.clone(), what: "list", source };
        let payloads = (Payloads::Skip, 0);
        let mut walker = Walker::new(&folder, self.expected(beginning), Some(to.end), payloads).map_err(list)?;
        loop {
            match walker.next() {
                Ok(Some(Item::Frame { segment, offset, header, extents, .. })) => {
                    let id = self.number_of(segment, offset, header.kind)?;
                    frame(Walked { segment, offset, id, header: &header, extents: &extents })?;
                }
                Ok(Some(Item::Seal { seal, .. })) if seal.point() == to.point => return Ok(()),
                Ok(Some(Item::Seal { .. })) => {}
                Ok(None) => return Err(GroupError::NoPoint { group: self.folder.group.clone(), point: to.point }),
                Err(bad) if bad.is_io() => return Err(JournalError::Unreadable { bad: bad.into() }.into()),
                Err(bad) => return Err(JournalError::DamagedSegment { bad: bad.into() }.into()),
            }
        }
    }
}

impl Shared {
    /// The number that a frame of the journal has.
    pub(super) fn number_of(&self, segment: u32, offset: u64, kind: FrameKind) -> Result<FrameId, FrameError> {
        if kind == FrameKind::Zero {
            return Ok(FrameId::ZERO);
        }
        let rule = DecodeError::Rule { what: "frame", rule: "is where it was when the journal was opened" };
        let path = || segment_path(&self.folder.journal(), segment);
        let number = self.frames.table.read().find(segment, offset);
        number.ok_or_else(|| FrameError::Damaged { path: path(), offset, source: rule })
    }
}

/// A frame met in a walk.
pub(super) struct Walked<'a> {
    pub(super) segment: u32,
    pub(super) offset: u64,
    pub(super) id: FrameId,
    pub(super) header: &'a FrameHeader,
    pub(super) extents: &'a [BlockExtent],
}
