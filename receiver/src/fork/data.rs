//! The file that has a fork's blocks.

use std::path::Path;

use blockdev::{BlockDevice, FileDevice, OpenOptions};

use super::{Access, ForkError};
use crate::disk::Disk;

/// A fork's data file.
#[derive(Debug)]
pub(super) enum Data {
    File(FileDevice),
    /// Of a simulation, whose disk knows what of it is durable.
    #[cfg(any(test, feature = "simulation"))]
    Watched(watched::Watched),
}

impl Data {
    pub(super) fn open(disk: &Disk, path: &Path, size_bytes: u64, access: Access) -> Result<Self, ForkError> {
        let read_only = access == Access::Read;
        #[cfg(any(test, feature = "simulation"))]
        if disk.in_one_thread() {
            let file = disk.open_settled(path).map_err(crate::store::at(path, "open the fork's data"))?;
            return Ok(Self::Watched(watched::Watched::new(file, size_bytes, read_only)));
        }
        #[cfg(not(any(test, feature = "simulation")))]
        let _ = disk;
        let options = OpenOptions { create_size: Some(size_bytes), read_only, ..OpenOptions::default() };
        Ok(Self::File(FileDevice::open(path, options)?))
    }
}

impl std::ops::Deref for Data {
    type Target = dyn BlockDevice;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::File(file) => file,
            #[cfg(any(test, feature = "simulation"))]
            Self::Watched(file) => file,
        }
    }
}

#[cfg(any(test, feature = "simulation"))]
mod watched {
    use std::io;
    use std::os::unix::fs::FileExt;
    use std::task::Poll;

    use blockdev::{BlockDevice, Buf, Extent, ExtentKind, IoFuture, ZeroMode};

    use crate::disk::DiskFile;

    /// A file of a simulated disk; whoever polls it waits for it. A write waits once before it is made, and once after.
    #[derive(Debug)]
    pub(in crate::fork) struct Watched {
        file: DiskFile,
        size_bytes: u64,
        read_only: bool,
    }

    impl Watched {
        pub(super) fn new(file: DiskFile, size_bytes: u64, read_only: bool) -> Self {
            Self { file, size_bytes, read_only }
        }

        async fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            if self.read_only {
                return Err(io::ErrorKind::ReadOnlyFilesystem.into());
            }
            pause().await;
            self.file.write_all_at(data, offset)?;
            pause().await;
            Ok(())
        }
    }

    /// Pending once.
    async fn pause() {
        let mut paused = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut paused, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    impl BlockDevice for Watched {
        fn size(&self) -> u64 {
            self.size_bytes
        }

        fn read_only(&self) -> bool {
            self.read_only
        }

        fn read<'a>(&'a self, offset: u64, mut buf: Buf) -> IoFuture<'a, Buf> {
            Box::pin(async move { self.file.file().read_exact_at(&mut buf, offset).map(|()| buf) })
        }

        fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
            Box::pin(async move { self.put(offset, &data).await.map(|()| data) })
        }

        fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
            Box::pin(async move { self.file.sync_data() })
        }

        fn write_zeroes<'a>(&'a self, offset: u64, length: u64, _mode: ZeroMode) -> IoFuture<'a, ()> {
            Box::pin(async move { self.put(offset, &vec![0; length as usize]).await })
        }

        fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
            self.write_zeroes(offset, length, ZeroMode::default())
        }

        fn extents<'a>(&'a self, _offset: u64, length: u64, _extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
            Box::pin(std::future::ready(Ok(vec![Extent { length, kind: ExtentKind::Data }])))
        }
    }
}
