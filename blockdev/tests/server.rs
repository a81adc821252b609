//! The server around the protocol: exports that come and go, ends that lose nothing, sockets that are private, errors that
//! reach the client as what they are.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use blockdev::nbd::{Export, ListenAddr, NbdServer, ServerOptions};
use blockdev::{
    BlockDevice, Buf, DelayDevice, Extent, Fault, FaultDevice, FileDevice, IoFuture, IoThreads, MemoryDevice, OpenOptions,
    Operation, ZeroMode,
};
use common::client::*;
use common::{MIB, Server, file_device, noise};

fn memory() -> Arc<MemoryDevice> {
    Arc::new(MemoryDevice::new(MIB))
}

#[test]
fn a_shutdown_finishes_what_is_in_flight() {
    let disk = memory();
    let slow = Arc::new(DelayDevice::new(disk.clone(), Duration::ZERO));
    let server = Server::new(slow.clone());
    let mut client = Client::connect(&server.socket, "disk", true);
    slow.hold(Operation::Write);
    let cookie = client.send_request(WRITE, 0, 10, 3, b"abc");
    server.wait(slow.until_held(1));
    server.wait(async {
        let (_, ()) = tokio::join!(server.server.shutdown(), async {
            // The listener is gone at once, the request is not.
            slow.until_held(1).await;
            slow.release();
        });
    });
    let answer = client.answer(0);
    assert_eq!((answer.cookie, answer.errno), (cookie, 0));
    client.expect_end();
    assert_eq!(&disk.snapshot()[10..13], b"abc");
    assert!(!server.socket.exists(), "the socket's file is removed");
}

#[test]
fn a_write_goes_on_when_its_client_is_gone() {
    let disk = memory();
    let slow = Arc::new(DelayDevice::new(disk.clone(), Duration::ZERO));
    let server = Server::new(slow.clone());
    slow.hold(Operation::Write);
    let mut client = Client::connect(&server.socket, "disk", true);
    client.send_request(WRITE, 0, 0, 3, b"abc");
    server.wait(slow.until_held(1));
    drop(client);
    slow.release();
    server.wait(server.server.shutdown());
    assert_eq!(&disk.snapshot()[..3], b"abc");
}

#[test]
fn exports_come_and_go_while_clients_work() {
    let server = Server::new(memory());
    let second = memory();
    server.server.add_export(Export::new("second", second.clone())).unwrap();
    let again = server.server.add_export(Export::new("second", second)).unwrap_err();
    assert_eq!(again.to_string(), "export \"second\": already exists on this server: remove it first or choose another name");
    let mut on_disk = Client::connect(&server.socket, "disk", true);
    let mut on_second = Client::connect(&server.socket, "second", true);
    on_second.write(0, b"x");
    // Served: a request is answered.
    on_disk.read(0, 1);
    let stats = server.server.connections();
    let names: Vec<_> = stats.iter().map(|stats| (stats.export.as_str(), stats.written_bytes)).collect();
    assert_eq!(names, [("disk", 0), ("second", 1)]);
    assert!(server.wait(server.server.remove_export("second")));
    assert!(!server.wait(server.server.remove_export("second")));
    on_second.expect_end();
    on_disk.write(0, b"still served");
    let mut late = Client::greet(&server.socket, 3);
    assert_eq!(late.option(7, &[&string("second")[..], &[0, 0]].concat()), [((1 << 31) + 6, vec![])]);
    assert_eq!(server.server.connections().len(), 1);
}

#[test]
fn the_empty_name_is_the_default_export() {
    let server = Server::new(Arc::new(MemoryDevice::new(512)));
    Client::connect(&server.socket, "", true).disconnect();
    server.server.add_export(Export::new("other", memory())).unwrap();
    let mut unsure = Client::greet(&server.socket, 3);
    assert_eq!(unsure.option(7, &[&string("")[..], &[0, 0]].concat()).len(), 1, "no default among two");
    let marked = Export { default: true, ..Export::new("marked", memory()) };
    server.server.add_export(marked).unwrap();
    let mut client = Client::connect(&server.socket, "", true);
    assert_eq!(client.read(MIB - 1, 1), [0], "it is the marked one");
}

#[test]
fn an_old_client_gets_in_by_export_name() {
    let server = Server::new(memory());
    for (flags, zeroes) in [(3, 0), (1, 124)] {
        let mut client = Client::greet(&server.socket, flags);
        client.send_option(1, 4, b"disk");
        assert_eq!(client.take(8), MIB.to_be_bytes());
        let transmission = client.take(2);
        assert_eq!(transmission[1] & 1, 1);
        assert_eq!(client.take(zeroes), vec![0; zeroes]);
        client.write(7, b"old but well");
        assert_eq!(client.read(7, 12), b"old but well");
        client.disconnect();
    }
}

#[test]
fn errors_of_the_device_reach_the_client_as_what_they_are() {
    let faults = Arc::new(FaultDevice::new(memory()));
    let server = Server::new(faults.clone());
    let mut client = Client::connect(&server.socket, "disk", true);
    faults.inject(Fault::nth(Operation::Write, 0, libc::ENOSPC));
    assert_eq!(client.call(WRITE, 0, 0, 2, b"ab").errno, ENOSPC);
    faults.inject(Fault::always(Operation::Read, libc::EIO).within(4096..8192));
    assert_eq!(client.call(READ, 0, 4000, 200, &[]).errno, EIO);
    assert_eq!(client.call(READ, 0, 0, 200, &[]).errno, 0);
    faults.inject(Fault::always(Operation::Flush, libc::EIO));
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).errno, EIO);
    for (command, payload) in [(WRITE, &b"ab"[..]), (TRIM, b""), (WRITE_ZEROES, b"")] {
        assert_eq!(client.call(command, 0, 0, 2, payload).errno, 0);
        assert_eq!(client.call(command, FUA, 0, 2, payload).errno, EIO, "FUA is a flush");
    }
    faults.inject(Fault::always(Operation::WriteZeroes, libc::EOPNOTSUPP));
    assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO, 0, 2, &[]).errno, ENOTSUP);
    faults.inject(Fault::always(Operation::Extents, libc::EIO));
    assert_eq!(client.call(BLOCK_STATUS, 0, 0, 2, &[]).errno, EIO);
}

/// A disk that takes long writes at once up to a byte, from which on it is full, or too slow to do anything at once.
struct Wall {
    disk: Arc<MemoryDevice>,
    at: u64,
    full: bool,
}

impl BlockDevice for Wall {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a, Buf> {
        self.disk.read(offset, buf)
    }
    fn write<'a>(&'a self, offset: u64, data: Buf) -> IoFuture<'a, Buf> {
        self.disk.write(offset, data)
    }
    fn flush<'a>(&'a self) -> IoFuture<'a, ()> {
        self.disk.flush()
    }
    fn write_zeroes<'a>(&'a self, offset: u64, length: u64, mode: ZeroMode) -> IoFuture<'a, ()> {
        self.disk.write_zeroes(offset, length, mode)
    }
    fn trim<'a>(&'a self, offset: u64, length: u64) -> IoFuture<'a, ()> {
        self.disk.trim(offset, length)
    }
    fn extents<'a>(&'a self, offset: u64, length: u64, extents_max: usize) -> IoFuture<'a, Vec<Extent>> {
        self.disk.extents(offset, length, extents_max)
    }
    fn try_write(&self, offset: u64, data: &[u8]) -> Option<std::io::Result<()>> {
        match (offset + data.len() as u64 > self.at, self.full) {
            (false, _) => self.disk.try_write(offset, data),
            (true, true) => Some(Err(std::io::Error::from_raw_os_error(libc::ENOSPC))),
            (true, false) => None,
        }
    }
}

/// A long write leaves the socket in pieces: whatever stops the device in the middle, the client gets one answer, and the stream
/// of requests goes on behind it.
#[test]
fn a_long_write_survives_a_device_that_stops_in_the_middle() {
    let data = noise(3, 900_000);
    for full in [false, true] {
        for at in [0, 70_000, 400_000, 900_000] {
            let disk = memory();
            let server = Server::new(Arc::new(Wall { disk: disk.clone(), at, full }));
            let mut client = Client::connect(&server.socket, "disk", true);
            for flags in [0, FUA] {
                let answer = client.call(WRITE, flags, 1_003, 900_000, &data);
                assert_eq!(answer.errno, if full { ENOSPC } else { 0 }, "at {at}");
                assert_eq!(client.call(WRITE, 0, 0, 3, b"abc").errno, if full && at == 0 { ENOSPC } else { 0 });
            }
            if !full {
                assert!(disk.snapshot()[1_003..901_003] == data, "at {at}");
                assert_eq!(server.server.connections()[0].written_bytes, 2 * 900_003);
            }
        }
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let bytes = noise(1, 9000);
    std::fs::write(&path, &bytes).unwrap();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let server = Server::new(Arc::new(FileDevice::open(&path, options).unwrap()));
    // Readers share it.
    FileDevice::open(&path, options).unwrap();
    let mut client = Client::connect(&server.socket, "disk", true);
    assert_eq!(client.call(WRITE, 0, 0, 1, b"x").errno, EPERM);
    assert_eq!(client.call(TRIM, 0, 0, 9000, &[]).errno, EPERM);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).errno, 0);
    assert!(client.read(0, 9000) == bytes);
}

#[test]
fn requests_beyond_the_limit_wait_in_the_socket() {
    let slow = Arc::new(DelayDevice::new(memory(), Duration::ZERO));
    let server = Server::new(slow.clone());
    let mut client = Client::connect(&server.socket, "disk", true);
    slow.hold(Operation::Read);
    let limit = 256;
    for _ in 0..limit + 50 {
        client.send_request(READ, 0, 0, 100, &[]);
    }
    server.wait(slow.until_held(limit));
    let queue = server.server.connections()[0].requests_in_flight;
    assert_eq!(queue.limit, limit as u64);
    assert!(queue.used <= queue.limit);
    slow.release();
    for _ in 0..limit + 50 {
        assert_eq!(client.answer(100).errno, 0);
    }
}

#[test]
fn a_large_read_tells_holes_and_obeys_dont_fragment() {
    let server = Server::new(memory());
    let mut client = Client::connect(&server.socket, "disk", true);
    client.write(500_000, b"in the middle");
    let answer = client.call(READ, 0, 0, MIB as u32, &[]);
    assert!(answer.chunks.len() == 3 && answer.chunks[0].1.is_err(), "{} chunks", answer.chunks.len());
    let whole = answer.data(0, MIB as usize);
    let answer = client.call(READ, DF, 0, MIB as u32, &[]);
    assert_eq!(answer.chunks.len(), 1);
    assert!(answer.data(0, MIB as usize) == whole);
    let status = client.call(BLOCK_STATUS, 0, 0, MIB as u32, &[]).extents;
    assert_eq!(status, [(499_712, 3), (4096, 0), (544_768, 3)]);
    assert_eq!(client.call(BLOCK_STATUS, REQ_ONE, 0, MIB as u32, &[]).extents, [(499_712, 3)]);
}

#[test]
fn the_socket_is_private_and_only_a_stale_one_is_replaced() {
    let server = Server::new(memory());
    let mode = std::fs::metadata(&server.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let bind =
        |path: &std::path::Path| NbdServer::bind(&ListenAddr::Unix(path.to_path_buf()), ServerOptions::default(), &server.io);
    let taken = bind(&server.socket).unwrap_err().to_string();
    assert!(taken.ends_with("another process listens on this socket: stop it or choose another path"), "{taken}");
    Client::connect(&server.socket, "disk", true).disconnect();

    let stale = server.folder.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    let replaced = bind(&stale).unwrap();
    UnixStream::connect(&stale).unwrap();
    drop(replaced);

    let file = server.folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let refused = bind(&file).unwrap_err().to_string();
    assert!(refused.ends_with("exists and is not a socket: remove it or choose another path"), "{refused}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn a_disk_that_is_open_elsewhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let first = file_device(folder.path(), 8192, false);
    let path = folder.path().join("disk.raw");
    let error = FileDevice::open(&path, OpenOptions::default()).unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    let error = FileDevice::open(&path, OpenOptions { read_only: true, ..OpenOptions::default() });
    assert!(error.is_err(), "nor may it be read while somebody writes");
    drop(first);
    let other_size = OpenOptions { create_size: Some(4096), ..OpenOptions::default() };
    let error = FileDevice::open(&path, other_size).unwrap_err().to_string();
    assert!(error.ends_with("is 8192 bytes long, not 4096: change the configured size or the file"), "{error}");
    let error = FileDevice::open(folder.path(), OpenOptions { read_only: true, ..OpenOptions::default() });
    assert!(error.unwrap_err().to_string().contains("neither a regular file nor a block device"));
    FileDevice::open(&path, OpenOptions::default()).unwrap();
}

#[test]
fn io_threads_end_with_their_last_handle_and_keep_operations_whole() {
    let folder = tempfile::tempdir().unwrap();
    let device = file_device(folder.path(), 16 * MIB, true);
    let io = IoThreads::new(2).unwrap();
    for index in 0..64 {
        let device = Arc::clone(&device);
        io.spawn(move || async move {
            let _ = device.write(index * 4096, Buf::copy_of(&[7; 4096])).await;
        });
    }
    let seen = io.block_on({
        let device = Arc::clone(&device);
        move || async move { device.read(15 * MIB, Buf::zeroed(4096)).await.map(|buf| buf.len()) }
    });
    assert_eq!(seen.unwrap().unwrap(), 4096);
    // Writes may still be in the kernel: the drop waits for it, and memory is not freed under it.
    drop(io);
    drop(device);
    FileDevice::open(folder.path().join("disk.raw"), OpenOptions::default()).unwrap();
}
