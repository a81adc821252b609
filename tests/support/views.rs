//! Every point of a store that no node has open, as its views show it.

use std::path::Path;
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, IoThreads};
use proto::Identity;
use receiver::{Limits, PointInfo, Receiver, ReceiverConfig, View};

/// A disk at a point.
pub(crate) struct Disk<'a> {
    name: String,
    view: Arc<View>,
    /// What is not in the page cache is read through io_uring.
    threads: &'a IoThreads,
}

impl Disk<'_> {
    /// The volume's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.view.size()
    }

    /// Reads a range.
    pub(crate) fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let view = Arc::clone(&self.view);
        let read = self.threads.block_on(move || async move { view.read(offset, Buf::zeroed(bytes)).await });
        read.expect("an io thread").unwrap_or_else(|e| panic!("{}: {bytes} bytes at {offset}: {e}", self.name)).to_vec()
    }
}

/// Opens the store, which recovers it as a node's start does, and calls `each` for the points that are `wanted`, oldest first. Returns
/// the names and cuts of all points.
pub(crate) fn each_point(
    store: &Path,
    group: &str,
    wanted: impl Fn(&PointInfo) -> bool,
    mut each: impl FnMut(&PointInfo, &[Disk<'_>]),
) -> Vec<(String, u64)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let threads = IoThreads::new(1).expect("an io thread");
    let identity = Identity::from_pem(&Identity::generate_pem().expect("a key")).expect("a key");
    let listen = "127.0.0.1:0".parse().expect("an address");
    let config =
        ReceiverConfig { listen, store: store.to_path_buf(), clients: Vec::new(), flatten: false, limits: Limits::default() };
    let receiver = runtime.block_on(Receiver::start(config, identity)).expect("a store that no node has open");
    let points = receiver.points(group).expect("its points");
    for info in points.iter().filter(|info| wanted(info)) {
        let (point, views) = runtime.block_on(receiver.view(group, Some(info.point))).expect("a view");
        assert_eq!(point, info.point);
        let disks =
            views.into_iter().map(|(name, view)| Disk { name: name.to_string(), view: Arc::new(view), threads: &threads });
        each(info, &disks.collect::<Vec<_>>());
    }
    runtime.block_on(receiver.shutdown());
    points.iter().map(|info| (info.point.to_string(), info.cut_unix_us)).collect()
}
