//! A client that lies. Every case ends in a clear refusal or the end of that one connection, and the server goes on serving
//! everybody else; a case that hangs fails by the client's read timeout.

mod common;

use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use blockdev::MemoryDevice;
use blockdev::nbd::ServerOptions;
use common::client::*;
use common::{MIB, Server, noise};

const SIZE: u64 = 40 * MIB;

fn server() -> Server {
    Server::new(Arc::new(MemoryDevice::new(SIZE)))
}

/// The server still serves.
fn alive(server: &Server) {
    let mut client = Client::connect(&server.socket, "disk", true);
    client.write(5, b"still here");
    assert_eq!(client.read(5, 10), b"still here");
    client.disconnect();
}

#[test]
fn a_bad_start_ends_the_connection() {
    let server = server();
    for flags in [4, u32::MAX] {
        Client::greet(&server.socket, flags).expect_end();
    }
    let mut bad_magic = Client::greet(&server.socket, 3);
    bad_magic.send(b"IHAVEN'TOPTION!!");
    bad_magic.expect_end();
    let mut silent = Client::greet(&server.socket, 3);
    silent.stream.shutdown(Shutdown::Write).unwrap();
    silent.expect_end();
    let mut cut = Client::greet(&server.socket, 3);
    cut.send_option(7, 100, b"only a part");
    cut.stream.shutdown(Shutdown::Write).unwrap();
    cut.expect_end();
    alive(&server);
}

#[test]
fn huge_options_are_refused_unread_and_unknown_ones_answered() {
    let server = server();
    let mut client = Client::greet(&server.socket, 3);
    assert_eq!(client.option(0x7fff_fff0, b"what is this"), [((1 << 31) + 1, vec![])]);
    assert_eq!(client.option(7, &string("no such disk")[..]), [((1 << 31) + 3, vec![])], "no count of requests");
    assert_eq!(client.option(7, &[&string("no such disk")[..], &[0, 0]].concat()), [((1 << 31) + 6, vec![])]);
    assert_eq!(client.option(5, &[]), [((1 << 31) + 2, vec![])], "TLS is not configured");
    // A count of queries that no body could hold must not reserve memory for them.
    assert_eq!(client.option(8, &[]), [(1, vec![])]);
    let queries = [&string("disk")[..], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(client.option(10, &queries), [((1 << 31) + 3, vec![])]);
    client.send_option(7, u32::MAX, b"");
    assert_eq!(&client.take(20)[8..16], [&7_u32.to_be_bytes()[..], &((1_u32 << 31) + 9).to_be_bytes()].concat());
    client.expect_end();
    let mut by_name = Client::greet(&server.socket, 3);
    by_name.send_option(1, u32::MAX, b"");
    by_name.expect_end();
    let mut unknown = Client::greet(&server.socket, 3);
    unknown.send_option(1, 4, b"nope");
    unknown.expect_end();
    alive(&server);
}

#[test]
fn a_client_that_does_not_finish_its_handshake_is_cut() {
    let options = ServerOptions { handshake_timeout: Duration::from_secs(2), ..ServerOptions::default() };
    let server = Server::with_options(Arc::new(MemoryDevice::new(SIZE)), options);
    let mut slow = Client::greet(&server.socket, 3);
    slow.expect_end();
    alive(&server);
}

#[test]
fn too_many_clients_are_turned_away() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let server = Server::with_options(Arc::new(MemoryDevice::new(SIZE)), options);
    let mut first = Client::connect(&server.socket, "disk", true);
    let mut second = Client::connect(&server.socket, "disk", true);
    // Served: a request is answered.
    assert_eq!((first.read(0, 1), second.read(0, 1)), (vec![0], vec![0]));
    let third = std::os::unix::net::UnixStream::connect(&server.socket).unwrap();
    let mut nothing = [0; 1];
    assert_eq!(std::io::Read::read(&mut &third, &mut nothing).unwrap(), 0, "closed at once");
    second.disconnect();
    assert_eq!(first.read(0, 3), [0; 3]);
}

/// Would catch strangers who never speak and hold the places of real clients.
#[test]
fn idle_handshakes_take_no_place_of_a_client() {
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let server = Server::with_options(Arc::new(MemoryDevice::new(SIZE)), options);
    let idle: Vec<_> = (0..8).map(|_| Client::greet(&server.socket, 3)).collect();
    let mut first = Client::connect(&server.socket, "disk", true);
    let mut second = Client::connect(&server.socket, "disk", true);
    assert_eq!((first.read(0, 3), second.read(0, 1)), (vec![0; 3], vec![0]));
    second.disconnect();
    // The idle ones stay: a place that they gave back later would be the last one's.
    let silent: Vec<_> = (0..100).map(|_| std::os::unix::net::UnixStream::connect(&server.socket).unwrap()).collect();
    let mut last = [0; 18];
    let refused = std::io::Read::read(&mut silent.last().unwrap(), &mut last).unwrap();
    assert_eq!(refused, 0, "handshakes have a limit of their own");
    assert_eq!(first.read(0, 3), [0; 3]);
    drop(idle);
}

#[test]
fn requests_out_of_range_or_with_unknown_bits_are_refused_one_by_one() {
    let server = server();
    for structured in [false, true] {
        let mut client = Client::connect(&server.socket, "disk", structured);
        let data = noise(1, 5000);
        for (command, flags, offset, length, expected) in [
            (READ, 0, SIZE, 1, EINVAL),
            (READ, 0, SIZE - 1, 2, EINVAL),
            (READ, 0, u64::MAX, 1, EINVAL),
            (READ, 0, u64::MAX - 3, u32::MAX, EINVAL),
            (READ, 0, 0, u32::MAX, EINVAL),
            (READ, 0, 0, (32 << 20) + 1, EINVAL),
            (READ, 1 << 15, 0, 1, EINVAL),
            (WRITE, 0, SIZE - 4999, 5000, ENOSPC),
            (WRITE, 0, u64::MAX - 4999, 5000, ENOSPC),
            (WRITE, 1 << 7, 0, 5000, EINVAL),
            (TRIM, 0, 1, u32::MAX, EINVAL),
            (WRITE_ZEROES, 0, 1, u32::MAX, ENOSPC),
            (WRITE_ZEROES, REQ_ONE, 0, 1, EINVAL),
            (CACHE, 0, SIZE, 1, EINVAL),
            (FLUSH, 0, 1, 0, EINVAL),
            (FLUSH, 0, 0, 1, EINVAL),
            (BLOCK_STATUS, 0, 0, 0, EINVAL),
            (BLOCK_STATUS, 0, SIZE - 1, 2, EINVAL),
            (4711, 0, 0, 1, EINVAL),
        ] {
            let payload = if command == WRITE { &data[..] } else { &[] };
            let answer = client.call(command, flags, offset, length, payload);
            assert_eq!((answer.errno, answer.chunks.len()), (expected, 0), "command {command} at {offset}+{length}");
        }
        // The payloads of the refused writes were skipped exactly, and nothing was written.
        assert_eq!(client.read(0, 100), [0; 100]);
        assert_eq!(client.call(READ, 0, 7, 0, &[]).errno, 0, "nothing is a legal amount");
        assert_eq!(client.call(WRITE, FUA, SIZE, 0, &[]).errno, 0);
        client.disconnect();
    }
    alive(&server);
}

#[test]
fn requests_that_cannot_be_followed_end_the_connection_after_the_good_ones() {
    let server = server();
    let mut client = Client::connect(&server.socket, "disk", true);
    let mut batch = request(WRITE, 0, 1, 100, 3, b"abc");
    batch.extend_from_slice(&[0xff; 28]);
    client.send(&batch);
    let answer = client.answer(0);
    assert_eq!((answer.cookie, answer.errno), (1, 0), "what came before is answered");
    client.expect_end();

    // More than may be sent at once: not read, not allocated.
    let mut client = Client::connect(&server.socket, "disk", true);
    client.send(&request(WRITE, 0, 1, 0, u32::MAX, b"x"));
    client.expect_end();

    // Cut in the header, in a small payload, in a large one.
    let offset = 1_000;
    for (bytes, changed, what) in [
        (request(READ, 0, 1, offset, 1, b"")[..27].to_vec(), 0, "header"),
        (request(WRITE, 0, 1, offset, 65_536, &[1; 65_535]), 0, "payload that is written whole"),
        (request(WRITE, 0, 1, offset, 500_000, &[1; 100_000]), 100_000, "payload that is written in pieces"),
    ] {
        let mut client = Client::connect(&server.socket, "disk", true);
        client.send(&bytes);
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.expect_end();
        let mut other = Client::connect(&server.socket, "disk", true);
        let seen = other.read(0, 600_000);
        let ones = seen.iter().filter(|b| **b == 1).count();
        assert!(ones <= changed && seen[offset as usize..][..ones].iter().all(|b| *b == 1), "{what}: only what came, in order");
        assert!(ones == 0 || (offset as usize + ones).is_multiple_of(4096), "{what}: whole blocks, as a disk that loses power");
    }
    alive(&server);
}

#[test]
fn a_client_that_reads_no_replies_is_held_back_and_harms_nobody() {
    let server = server();
    let mut greedy = Client::connect(&server.socket, "disk", true);
    greedy.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // Asks for far more than the bytes in flight of one connection, 8 GiB, and takes nothing.
    let ask = request(READ, DF, 9, 0, 32 << 20, b"").repeat(256);
    let held_back = (0..1000).any(|_| std::io::Write::write_all(&mut greedy.stream, &ask).is_err());
    assert!(held_back, "7 MB of requests were taken from a client that reads nothing");
    for stats in server.server.connections() {
        assert!(stats.bytes_in_flight.used <= stats.bytes_in_flight.limit, "{stats:?}");
        assert!(stats.requests_in_flight.used <= stats.requests_in_flight.limit, "{stats:?}");
    }
    alive(&server);
}
