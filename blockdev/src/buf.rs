//! The buffer that travels through a disk stack.
//!
//! Owned, because an io_uring operation owns its memory until it completes; aligned to 4 KiB, so that one
//! buffer serves O_DIRECT and buffered files alike. The only unsafe code is the allocation.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every buffer in bytes: the largest logical block size that O_DIRECT asks for in practice.
pub(crate) const BUF_ALIGN_BYTES: usize = 4096;

/// An owned, zero-initialised byte buffer aligned to [`BUF_ALIGN_BYTES`].
pub struct Buf {
    ptr: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: `Buf` owns its allocation exclusively, exactly as `Box<[u8]>` does.
unsafe impl Send for Buf {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buf {}

impl Buf {
    /// A buffer of `len` bytes, all zero. The caller has bounded `len`; allocation failure aborts as it does for `Vec`.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.next_multiple_of(BUF_ALIGN_BYTES).max(BUF_ALIGN_BYTES);
        let layout = Self::layout(capacity);
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Self { ptr, len, capacity }
    }

    /// A buffer that holds a copy of `data`.
    #[must_use]
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::zeroed(data.len());
        buf.copy_from_slice(data);
        buf
    }

    /// Bytes this allocation can hold; at least `len()`.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the length to `len` without touching the content (all of the capacity is initialised).
    ///
    /// # Panics
    /// If `len` exceeds the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "length {len} beyond capacity {}", self.capacity);
        self.len = len;
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUF_ALIGN_BYTES).expect("capacity is bounded by isize")
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, freed once.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` bytes from `ptr` are allocated and initialised (zeroed at birth).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_keep_their_content() {
        for len in [0, 1, 4095, 4096, 4097, 1 << 20] {
            let mut buf = Buf::zeroed(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % BUF_ALIGN_BYTES, 0);
            assert!(buf.iter().all(|&b| b == 0));
            buf.fill(7);
            assert_eq!(*Buf::copy_of(&buf), *buf);
        }
    }
}
