//! Every point of a store that no node has open, as its views show it, and its active copies.

use std::path::Path;
use std::sync::Arc;

use blockdev::{BlockDevice, Buf, IoThreads};
use proto::Identity;
use receiver::{Limits, PointInfo, Receiver, ReceiverConfig};
use tokio::runtime::Runtime;

/// A disk at a point, or of an active copy.
pub(crate) struct Disk<'a> {
    name: String,
    device: Arc<dyn BlockDevice>,
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
        self.device.size()
    }

    /// Reads a range.
    pub(crate) fn read(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let device = Arc::clone(&self.device);
        let read = self.threads.block_on(move || async move { device.read(offset, Buf::zeroed(bytes)).await });
        read.expect("an io thread").unwrap_or_else(|e| panic!("{}: {bytes} bytes at {offset}: {e}", self.name)).to_vec()
    }
}

/// Opens a store as a node's start does, which recovers it.
fn open(store: &Path) -> (Runtime, Receiver) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let identity = Identity::from_pem(&Identity::generate_pem().expect("a key")).expect("a key");
    let listen = "127.0.0.1:0".parse().expect("an address");
    let config =
        ReceiverConfig { listen, store: store.to_path_buf(), clients: Vec::new(), flatten: false, limits: Limits::default() };
    let receiver = runtime.block_on(Receiver::start(config, identity)).expect("a store that no node has open");
    (runtime, receiver)
}

/// Opens the store and calls `each` for the points that are `wanted`, oldest first. Returns the names and cuts of all points.
pub(crate) fn each_point(
    store: &Path,
    group: &str,
    wanted: impl Fn(&PointInfo) -> bool,
    each: impl FnMut(&PointInfo, &[Disk<'_>]),
) -> Vec<(String, u64)> {
    let (runtime, receiver) = open(store);
    let points = points(&runtime, &receiver, group, wanted, each);
    runtime.block_on(receiver.shutdown());
    points
}

/// As [`each_point`]; then `active` is called for each active copy, opened as a start opens it.
pub(crate) fn each_point_and_copy(
    store: &Path,
    group: &str,
    wanted: impl Fn(&PointInfo) -> bool,
    each: impl FnMut(&PointInfo, &[Disk<'_>]),
    mut active: impl FnMut(&[Disk<'_>]),
) {
    let (runtime, receiver) = open(store);
    points(&runtime, &receiver, group, wanted, each);
    let threads = IoThreads::new(1).expect("an io thread");
    for activated in runtime.block_on(receiver.activated()) {
        let disks = activated.expect("an active copy").volumes.into_iter();
        let disks = disks.map(|(name, device)| Disk { name: name.to_string(), device, threads: &threads });
        active(&disks.collect::<Vec<_>>());
    }
    runtime.block_on(receiver.shutdown());
}

fn points(
    runtime: &Runtime,
    receiver: &Receiver,
    group: &str,
    wanted: impl Fn(&PointInfo) -> bool,
    mut each: impl FnMut(&PointInfo, &[Disk<'_>]),
) -> Vec<(String, u64)> {
    let threads = IoThreads::new(1).expect("an io thread");
    let points = receiver.points(group).expect("its points");
    for info in points.iter().filter(|info| wanted(info)) {
        let (point, views) = runtime.block_on(receiver.view(group, Some(info.point))).expect("a view");
        assert_eq!(point, info.point);
        let disk = |(name, view): (proto::Name, receiver::View)| Disk {
            name: name.to_string(),
            device: Arc::new(view),
            threads: &threads,
        };
        each(info, &views.into_iter().map(disk).collect::<Vec<_>>());
    }
    points.iter().map(|info| (info.point.to_string(), info.cut_unix_us)).collect()
}
