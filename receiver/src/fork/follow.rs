//! Whom the changes of a fork are told to: one at a time, the latest who asked.
//!
//! What must hold: a change is told to whoever follows when it is made, whatever became of those who followed before. A conversation whose primary
//! has died may end seconds after the next one began, and must not take anything from it.

use std::sync::Arc;

use blockdev::BlockDevice;
use proto::DirtyMap;

use super::device::ForkDevice;

/// What changed in a fork since somebody last asked.
#[derive(Debug)]
pub(super) struct Changes {
    follower: u64,
    pub(super) blocks: DirtyMap,
}

/// The right to be told of a fork's changes, until another one takes it or this is dropped.
#[derive(Debug)]
pub(crate) struct Follower {
    device: Arc<ForkDevice>,
    number: u64,
}

impl Follower {
    /// Follows `device` from here on. Returns also the blocks that are the fork's own by now.
    pub(crate) fn of(device: &Arc<ForkDevice>) -> (Self, DirtyMap) {
        let mut own = device.own.write();
        own.followers += 1;
        let number = own.followers;
        own.changed = Some(Changes { follower: number, blocks: DirtyMap::new(device.size()) });
        (Self { device: Arc::clone(device), number }, own.written.blocks.clone())
    }

    /// The blocks that were changed since the last call, each of them after it was on the disk; `None` if somebody else follows by now.
    pub(crate) fn take_changed(&self) -> Option<DirtyMap> {
        let mut own = self.device.own.write();
        let changes = own.changed.as_mut().filter(|changes| changes.follower == self.number)?;
        Some(std::mem::replace(&mut changes.blocks, DirtyMap::new(self.device.size())))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut own = self.device.own.write();
        own.changed = own.changed.take().filter(|changes| changes.follower != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{SIZE, scene};
    use super::*;
    use blockdev::{Buf, IoThreads};
    use proto::units::BLOCK_BYTES;

    /// Would catch changes that are lost to the one who follows because an earlier one ends, or asks, late.
    #[test]
    fn who_followed_before_takes_nothing_from_who_follows_now() {
        let scene = scene();
        let (fork, io) = (scene.open(), IoThreads::new(1).unwrap());
        let write = |block: u64| {
            let fork = Arc::clone(&fork);
            let written = io.block_on(move || async move { fork.write(block * BLOCK_BYTES, Buf::zeroed(4096)).await.map(drop) });
            written.unwrap().unwrap();
        };
        let blocks = |map: DirtyMap| (0..SIZE / BLOCK_BYTES).filter(|block| map.contains(*block)).collect::<Vec<_>>();
        write(1);
        let (first, own) = Follower::of(&fork);
        assert_eq!(blocks(own), [1]);
        write(2);
        assert_eq!(first.take_changed().map(blocks), Some(vec![2]));
        write(3);
        let (second, own) = Follower::of(&fork);
        assert_eq!(blocks(own), [1, 2, 3]);
        write(4);
        assert!(first.take_changed().is_none(), "it is told that it does not follow any more");
        write(5);
        drop(first);
        write(6);
        assert_eq!(second.take_changed().map(blocks), Some(vec![4, 5, 6]));
        assert_eq!(second.take_changed().map(blocks), Some(Vec::new()));
    }
}
