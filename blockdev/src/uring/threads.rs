//! A small pool of operating-system threads, each with its own ring and its own single-threaded runtime.
//!
//! Tasks are `!Send` and stay on the thread they were spawned on. The threads end when the last handle is dropped:
//! tasks that are still there are dropped, then the kernel is waited for.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;

use super::ring;
use super::watch::watch_ring;
use crate::waits;

type Job = Box<dyn FnOnce() + Send>;

/// A handle to the pool; clones share it.
#[derive(Clone)]
pub struct IoThreads {
    inner: Arc<Inner>,
}

struct Inner {
    threads: Vec<IoThread>,
    next: AtomicUsize,
}

struct IoThread {
    // Unbounded: a job is a task's start, and whoever starts tasks (a listener, a replicator) bounds their number.
    jobs: Option<mpsc::UnboundedSender<Job>>,
    handle: Option<JoinHandle<()>>,
}

impl IoThreads {
    /// Starts `count` threads (at least one).
    ///
    /// # Errors
    /// When the kernel refuses a ring (io_uring disabled, out of locked memory) or a thread.
    pub fn new(count: usize) -> io::Result<Self> {
        let threads = (0..count.max(1)).map(IoThread::start).collect::<io::Result<Vec<_>>>()?;
        Ok(Self { inner: Arc::new(Inner { threads, next: AtomicUsize::new(0) }) })
    }

    /// Number of threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.inner.threads.len()
    }

    /// Starts a task on the next thread in turn. The closure runs there, so its future need not be `Send`.
    pub fn spawn<F, Fut>(&self, task: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        self.spawn_on(self.inner.next.fetch_add(1, Ordering::Relaxed), task);
    }

    /// Starts a task on thread `index` modulo the number of threads: for tasks that must share a thread.
    pub fn spawn_on<F, Fut>(&self, index: usize, task: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let thread = &self.inner.threads[index % self.inner.threads.len()];
        if let Some(jobs) = &thread.jobs {
            // A send fails only when the thread is gone, and it outlives this handle unless it panicked.
            let _ = jobs.send(Box::new(move || drop(tokio::task::spawn_local(task()))));
        }
    }

    /// Runs `job` once on each thread.
    pub fn on_each(&self, job: impl Fn() + Clone + Send + 'static) {
        for index in 0..self.count() {
            let job = job.clone();
            self.spawn_on(index, || async move { job() });
        }
    }

    /// Runs a task on the next thread in turn and gives its result to any caller, on whatever runtime.
    ///
    /// # Errors
    /// When the task panicked.
    pub fn call<F, Fut, T>(&self, task: F) -> impl Future<Output = io::Result<T>> + Send + use<F, Fut, T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        self.spawn(move || async move {
            let _ = sender.send(task().await);
        });
        async move { receiver.await.map_err(|_| io::Error::other("task on an io thread panicked")) }
    }

    /// As [`call`](Self::call), blocking the calling thread, which must not be an io thread.
    ///
    /// # Errors
    /// When the task panicked.
    pub fn block_on<F, Fut, T>(&self, task: F) -> io::Result<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T> + 'static,
        T: Send + 'static,
    {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.spawn(move || async move {
            let _ = sender.send(task().await);
        });
        receiver.recv().map_err(|_| io::Error::other("task on an io thread panicked"))
    }
}

impl std::fmt::Debug for IoThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoThreads({})", self.count())
    }
}

impl IoThread {
    fn start(index: usize) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::unbounded_channel();
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        let handle = std::thread::Builder::new().name(format!("io-{index}")).spawn(move || {
            let built = ring::install().and_then(|fd| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .on_thread_park(ring::submit_pending)
                    .on_thread_unpark(waits::note)
                    .build()?;
                let guard = runtime.enter();
                let completions = watch_ring(fd)?;
                drop(guard);
                Ok((runtime, completions))
            });
            match built {
                Ok((runtime, completions)) => {
                    let _ = ready.send(Ok(()));
                    serve(runtime, completions, inbox);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
            ring::uninstall();
        })?;
        started.recv().map_err(|_| io::Error::other("io thread died while starting"))??;
        Ok(Self { jobs: Some(jobs), handle: Some(handle) })
    }
}

fn serve(runtime: tokio::runtime::Runtime, completions: AsyncFd<ring::RingFd>, mut inbox: mpsc::UnboundedReceiver<Job>) {
    let tasks = LocalSet::new();
    tasks.spawn_local(async move {
        while let Ok(mut guard) = completions.readable().await {
            ring::dispatch();
            guard.clear_ready();
        }
    });
    tasks.block_on(&runtime, async move {
        while let Some(job) = inbox.recv().await {
            job();
        }
    });
    // Tasks first (their operations move into the ring's table), then the runtime they refer to.
    {
        let _guard = runtime.enter();
        drop(tasks);
    }
    drop(runtime);
}

impl Drop for Inner {
    fn drop(&mut self) {
        for thread in &mut self.threads {
            thread.jobs = None;
        }
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take()
                && handle.thread().id() != std::thread::current().id()
            {
                let _ = handle.join();
            }
        }
    }
}
