//! Requests that bypass the page cache.
//!
//! O_DIRECT wants 4 KiB alignment (the largest logical block size in use). A write that is not aligned reads its first and
//! last block, changes them and writes whole blocks, under an exclusive lock of those blocks; aligned writes
//! take a shared lock, so a read-modify-write can never put old bytes over new ones. The last partial block of a file whose
//! size is no multiple of 4 KiB goes through the page cache, since a direct write would make the file longer;
//! the kernel keeps the two coherent (a direct request first writes back and drops cached pages of its range), and the
//! locks keep requests of both kinds apart.

use std::io;

use super::{FileDevice, PAGE_BYTES};
use crate::Buf;
use crate::ranges::RangeGuard;
use crate::uring::SharedFile;

impl FileDevice {
    /// Where the last partial block starts; the size if there is none.
    fn direct_end(&self) -> u64 {
        self.size - self.size % PAGE_BYTES
    }

    pub(super) async fn read_direct(&self, direct: &SharedFile, offset: u64, mut buf: Buf) -> io::Result<Buf> {
        let length = buf.len() as u64;
        let end = offset + length;
        if end <= self.direct_end() && offset.is_multiple_of(PAGE_BYTES) && length.is_multiple_of(PAGE_BYTES) {
            return direct.read_exact_at(offset, buf).await;
        }
        let first = offset - offset % PAGE_BYTES;
        let whole = self.read_blocks(direct, first, end).await?;
        let skip = (offset - first) as usize;
        buf.copy_from_slice(&whole[skip..skip + length as usize]);
        Ok(buf)
    }

    /// Reads from the block boundary `first` to at least `end`, and at most to the end of the file.
    async fn read_blocks(&self, direct: &SharedFile, first: u64, end: u64) -> io::Result<Buf> {
        let last = end.next_multiple_of(PAGE_BYTES).min(self.size);
        let direct_last = last.min(self.direct_end());
        let mut whole = Buf::zeroed((last - first) as usize);
        if first < direct_last {
            whole.set_len((direct_last - first) as usize);
            whole = direct.read_exact_at(first, whole).await?;
            whole.set_len((last - first) as usize);
        }
        if last > direct_last {
            let tail = self.file.read_exact_at(direct_last, Buf::zeroed((last - direct_last) as usize)).await?;
            let at = whole.len() - tail.len();
            whole[at..].copy_from_slice(&tail);
        }
        Ok(whole)
    }

    pub(super) async fn write_direct(&self, direct: &SharedFile, offset: u64, data: Buf) -> io::Result<Buf> {
        let end = offset + data.len() as u64;
        let aligned = offset.is_multiple_of(PAGE_BYTES) && end.is_multiple_of(PAGE_BYTES);
        let _guard = self.lock_blocks(offset, end, !aligned).await;
        if aligned {
            return direct.write_all_at(offset, data).await;
        }
        let direct_end = self.direct_end();
        let split = (direct_end.clamp(offset, end) - offset) as usize;
        if split > 0 {
            self.write_modified(direct, offset, &data[..split]).await?;
        }
        if split < data.len() {
            self.file.write_all_at(offset + split as u64, Buf::copy_of(&data[split..])).await?;
        }
        Ok(data)
    }

    /// Read-modify-write of `data`, which ends at or before `direct_end`, under the caller's lock.
    async fn write_modified(&self, direct: &SharedFile, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        let first = offset - offset % PAGE_BYTES;
        let last = end.next_multiple_of(PAGE_BYTES);
        let page = PAGE_BYTES as usize;
        let mut whole = Buf::zeroed((last - first) as usize);
        if first < offset {
            let block = direct.read_exact_at(first, Buf::zeroed(page)).await?;
            whole[..page].copy_from_slice(&block);
        }
        if end < last && (last - first > PAGE_BYTES || first == offset) {
            let block = direct.read_exact_at(last - PAGE_BYTES, Buf::zeroed(page)).await?;
            let at = whole.len() - page;
            whole[at..].copy_from_slice(&block);
        }
        let skip = (offset - first) as usize;
        whole[skip..skip + data.len()].copy_from_slice(data);
        direct.write_all_at(first, whole).await.map(drop)
    }

    /// Zeroing must not slip between the read and the write of a read-modify-write.
    pub(super) async fn lock_for_zero(&self, offset: u64, length: u64) -> Option<RangeGuard<'_>> {
        self.direct.as_ref()?;
        Some(self.lock_blocks(offset, offset + length, true).await)
    }

    async fn lock_blocks(&self, offset: u64, end: u64, exclusive: bool) -> RangeGuard<'_> {
        self.ranges.lock(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES), exclusive).await
    }
}
