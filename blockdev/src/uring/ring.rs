//! One io_uring per io thread, kept in a thread-local, with a table of operations.
//!
//! An operation owns everything the kernel may touch (`keep`). When its future is dropped early, `keep` moves into the
//! table and lives until the completion arrives. Submissions are collected and handed over when the thread
//! is about to sleep (`submit_pending`), so a burst of requests costs one system call.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use io_uring::{IoUring, squeue};

/// Submission entries per ring. When it is full the collected entries are submitted at once and the caller goes on:
/// the kernel takes them, so this bounds a batch and not the operations in flight.
const RING_ENTRIES: u32 = 256;

enum Slot {
    Free,
    Waiting(Option<Waker>),
    Done(i32),
    /// The future is gone, the kernel is not done: holds what the kernel may still touch.
    Abandoned(#[allow(dead_code, reason = "kept alive, never looked at")] Box<dyn Any>),
}

pub(super) struct Ring {
    uring: IoUring,
    slots: Vec<Slot>,
    free: Vec<usize>,
}

thread_local! {
    static RING: RefCell<Option<Ring>> = const { RefCell::new(None) };
}

/// The ring's descriptor, readable when completions wait.
pub(super) struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

/// Creates this thread's ring.
pub(super) fn install() -> io::Result<RingFd> {
    // Completions are only looked at when the thread enters the kernel anyway; older kernels do not know the flags.
    let uring = IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .build(RING_ENTRIES)
        .or_else(|_| IoUring::new(RING_ENTRIES))?;
    let fd = RingFd(uring.as_raw_fd());
    RING.with_borrow_mut(|ring| *ring = Some(Ring { uring, slots: Vec::new(), free: Vec::new() }));
    Ok(fd)
}

/// Waits for every operation that is still in the kernel and removes the ring. Called after all tasks are gone.
pub(super) fn uninstall() {
    loop {
        let busy = RING.with_borrow_mut(|ring| {
            ring.as_mut().is_some_and(|ring| {
                let busy = ring.free.len() < ring.slots.len();
                if busy {
                    // An error other than an interruption would come back for ever; the slots then stay leaked below.
                    if let Err(error) = ring.uring.submit_and_wait(1)
                        && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
                    {
                        return false;
                    }
                }
                busy
            })
        });
        if !busy {
            break;
        }
        dispatch();
    }
    if let Some(ring) = RING.with_borrow_mut(Option::take)
        && ring.free.len() < ring.slots.len()
    {
        // The kernel could not be waited for: what it may still write to must never be freed.
        std::mem::forget(ring.slots);
    }
}

/// Hands collected submissions to the kernel. Cheap when there are none. Called when the thread is about to sleep, and by
/// tasks that keep it busy for long.
pub(crate) fn submit_pending() {
    let overflow = RING.with_borrow_mut(|ring| ring.as_mut().is_some_and(|ring| !ring.submit()));
    if overflow {
        dispatch();
        RING.with_borrow_mut(|ring| ring.as_mut().map(Ring::submit));
    }
}

/// Takes all waiting completions and wakes their futures.
pub(super) fn dispatch() {
    let mut wakers = Vec::new();
    let mut garbage = Vec::new();
    RING.with_borrow_mut(|ring| {
        let Some(ring) = ring.as_mut() else { return };
        for entry in ring.uring.completion() {
            let index = entry.user_data() as usize;
            let Some(slot) = ring.slots.get_mut(index) else { continue };
            match std::mem::replace(slot, Slot::Done(entry.result())) {
                Slot::Waiting(waker) => wakers.extend(waker),
                Slot::Abandoned(keep) => {
                    *slot = Slot::Free;
                    ring.free.push(index);
                    garbage.push(keep);
                }
                Slot::Free | Slot::Done(_) => unreachable!("one completion per operation"),
            }
        }
    });
    // Outside the borrow: both may come back to the ring.
    drop(garbage);
    for waker in wakers {
        waker.wake();
    }
}

impl Ring {
    /// False when the kernel wants completions taken first.
    fn submit(&mut self) -> bool {
        loop {
            if self.uring.submission().is_empty() {
                return true;
            }
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// A started operation. Resolves to the kernel's result (a negative errno on failure) and what it owned.
pub(super) struct Op<K: 'static> {
    slot: usize,
    keep: Option<K>,
    // Bound to the thread whose ring it is in.
    _thread: PhantomData<*const ()>,
}

impl<K> Unpin for Op<K> {}

/// Starts `entry` on this thread's ring.
///
/// # Safety
/// Every pointer and descriptor in `entry` must stay valid as long as `keep` is alive, wherever `keep` moves, and nothing
/// else may access the memory in a way that conflicts with the operation until it resolves.
pub(super) unsafe fn start<K: 'static>(entry: &squeue::Entry, keep: K) -> io::Result<Op<K>> {
    RING.with_borrow_mut(|ring| {
        let ring = ring.as_mut().ok_or_else(|| io::Error::other("file operation outside of an io thread"))?;
        let slot = ring.free.pop().unwrap_or_else(|| {
            ring.slots.push(Slot::Free);
            ring.slots.len() - 1
        });
        let entry = entry.clone().user_data(slot as u64);
        loop {
            // SAFETY: the caller's promise; `keep` is owned by the `Op`, then by the slot, until the completion.
            if unsafe { ring.uring.submission().push(&entry) }.is_ok() {
                break;
            }
            if !ring.submit() {
                ring.free.push(slot);
                return Err(io::Error::from_raw_os_error(libc::EAGAIN));
            }
        }
        ring.slots[slot] = Slot::Waiting(None);
        Ok(Op { slot, keep: Some(keep), _thread: PhantomData })
    })
}

impl<K> Future for Op<K> {
    type Output = (i32, K);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = RING.with_borrow_mut(|ring| {
            let ring = ring.as_mut().expect("an operation lives on its io thread");
            let slot = &mut ring.slots[self.slot];
            match slot {
                Slot::Done(result) => {
                    let result = *result;
                    *slot = Slot::Free;
                    ring.free.push(self.slot);
                    Some(result)
                }
                Slot::Waiting(waker) => {
                    match waker {
                        Some(waker) => waker.clone_from(cx.waker()),
                        None => *waker = Some(cx.waker().clone()),
                    }
                    None
                }
                Slot::Free | Slot::Abandoned(_) => unreachable!("the future owns its slot"),
            }
        });
        match result {
            Some(result) => Poll::Ready((result, self.keep.take().expect("resolves once"))),
            None => Poll::Pending,
        }
    }
}

impl<K: 'static> Drop for Op<K> {
    fn drop(&mut self) {
        let Some(keep) = self.keep.take() else { return };
        let mut keep = Some(keep);
        // `try_with` fails only while the thread's locals are torn down, after `uninstall`.
        let _ = RING.try_with(|ring| {
            let mut ring = ring.borrow_mut();
            let Some(ring) = ring.as_mut() else { return };
            let slot = &mut ring.slots[self.slot];
            if matches!(slot, Slot::Done(_)) {
                *slot = Slot::Free;
                ring.free.push(self.slot);
            } else if let Some(keep) = keep.take() {
                *slot = Slot::Abandoned(Box::new(keep));
                return;
            }
            drop(keep.take());
        });
        // No ring any more: the kernel's state is unknown, so the memory is leaked rather than freed.
        std::mem::forget(keep);
    }
}
