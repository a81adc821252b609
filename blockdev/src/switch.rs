//! A disk whose content another device has, which can be exchanged while the disk is in use.
//!
//! A request goes to the device that is there when it begins; one that is under way during an exchange ends where it began. Whoever exchanges
//! sees to it that nobody minds.

use std::io;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::{BlockDevice, Buf, Extent, IoFuture, ZeroMode};

/// See the module.
pub struct SwitchDevice {
    size: u64,
    inner: RwLock<Arc<dyn BlockDevice>>,
}

impl std::fmt::Debug for SwitchDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SwitchDevice of {} bytes", self.size)
    }
}

impl SwitchDevice {
    /// A disk that is `inner` to begin with.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Self {
        Self { size: inner.size(), inner: RwLock::new(inner) }
    }

    /// The device that has the content now.
    #[must_use]
    pub fn inner(&self) -> Arc<dyn BlockDevice> {
        self.inner.read().clone()
    }

    /// Makes the disk be `other` from here on.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if `other` is of another size; nothing is changed then.
    pub fn exchange(&self, other: Arc<dyn BlockDevice>) -> io::Result<()> {
        let (ours, theirs) = (self.size, other.size());
        if ours != theirs {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a disk of {ours} bytes cannot become one of {theirs}"),
            ));
        }
        let old = std::mem::replace(&mut *self.inner.write(), other);
        // Freed outside: nobody waits for that.
        drop(old);
        Ok(())
    }
}

impl BlockDevice for SwitchDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.inner().read_only()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        let inner = self.inner();
        Box::pin(async move { inner.read(offset, buf).await })
    }

    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        let inner = self.inner();
        Box::pin(async move { inner.write(offset, data).await })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        let inner = self.inner();
        Box::pin(async move { inner.flush().await })
    }

    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        let inner = self.inner();
        Box::pin(async move { inner.write_zeroes(offset, length, mode).await })
    }

    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        let inner = self.inner();
        Box::pin(async move { inner.trim(offset, length).await })
    }

    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        let inner = self.inner();
        Box::pin(async move { inner.extents(offset, length, extents_max).await })
    }

    fn cache<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        let inner = self.inner();
        Box::pin(async move { inner.cache(offset, length).await })
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Option<io::Result<()>> {
        self.inner.read().try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Option<io::Result<()>> {
        self.inner.read().try_write(offset, data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoThreads, MemoryDevice};

    /// Would catch a request that goes to the old device after an exchange, and a disk that changes its size.
    #[test]
    fn requests_go_to_the_device_that_is_there() {
        let (first, second) = (Arc::new(MemoryDevice::new(8192)), Arc::new(MemoryDevice::new(8192)));
        let switch = Arc::new(SwitchDevice::new(first.clone()));
        let io = IoThreads::new(1).unwrap();
        let (device, other, old) = (switch.clone(), second.clone(), first.clone());
        io.block_on(move || async move {
            device.write(0, Buf::copy_of(&[1; 512])).await.unwrap();
            device.exchange(other.clone()).unwrap();
            assert_eq!(device.read(0, Buf::zeroed(512)).await.unwrap()[..], [0; 512]);
            device.write(0, Buf::copy_of(&[2; 512])).await.unwrap();
            assert_eq!(other.read(0, Buf::zeroed(512)).await.unwrap()[..], [2; 512]);
            assert_eq!(old.read(0, Buf::zeroed(512)).await.unwrap()[..], [1; 512]);
        })
        .unwrap();
        let refused = switch.exchange(Arc::new(MemoryDevice::new(4096))).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(switch.inner().size(), 8192);
    }
}
