//! NBD requests against a plain `Vec<u8>`: whatever is asked, every byte reads as the oracle says, on a disk in
//! memory and on files, through the page cache and past it, with sizes that are no multiple of a block.

mod common;

use std::sync::Arc;

use blockdev::{BlockDevice, MemoryDevice};
use common::client::*;
use common::{Server, file_device, noise};
use proptest::prelude::*;

/// No multiple of 4096 nor of 512.
const SIZE: u64 = 300_000 + 77;

#[derive(Clone, Debug)]
enum Step {
    Read { offset: u64, length: u32, flags: u16 },
    Write { offset: u64, length: u32, seed: u64, fua: bool },
    Zero { offset: u64, length: u32, flags: u16 },
    Trim { offset: u64, length: u32, fua: bool },
    Status { offset: u64, length: u32, one: bool },
    Cache { offset: u64, length: u32 },
    Flush,
}

fn range() -> impl Strategy<Value = (u64, u32)> {
    let edges = prop_oneof![0..SIZE, (0..SIZE / 4096).prop_map(|block| block * 4096), SIZE - 5000..SIZE];
    let lengths = prop_oneof![0_u64..20, Just(512), Just(4096), 0_u64..10_000, 0_u64..200_000];
    (edges, lengths).prop_map(|(offset, length)| (offset, length.min(SIZE - offset) as u32))
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![Just(0), Just(NO_HOLE), Just(FAST_ZERO), Just(NO_HOLE | FAST_ZERO | FUA)];
    prop_oneof![
        3 => (range(), prop_oneof![Just(0), Just(DF), Just(FUA)])
            .prop_map(|((offset, length), flags)| Step::Read { offset, length, flags }),
        4 => (range(), any::<u64>(), any::<bool>())
            .prop_map(|((offset, length), seed, fua)| Step::Write { offset, length, seed, fua }),
        2 => (range(), flags).prop_map(|((offset, length), flags)| Step::Zero { offset, length, flags }),
        1 => (range(), any::<bool>()).prop_map(|((offset, length), fua)| Step::Trim { offset, length, fua }),
        1 => (range(), any::<bool>()).prop_map(|((offset, length), one)| Step::Status { offset, length, one }),
        1 => range().prop_map(|(offset, length)| Step::Cache { offset, length }),
        1 => Just(Step::Flush),
    ]
}

fn slice(oracle: &mut [u8], offset: u64, length: u32) -> &mut [u8] {
    &mut oracle[offset as usize..][..length as usize]
}

/// A status may stop early, must not overshoot, and must not call data zero.
fn check_status(oracle: &mut [u8], offset: u64, length: u32, one: bool, answer: &Answer) {
    assert!(!answer.extents.is_empty() && (!one || answer.extents.len() == 1));
    let mut at = offset;
    for &(run, state) in &answer.extents {
        assert!(run > 0);
        assert!(state & 2 == 0 || slice(oracle, at, run).iter().all(|&byte| byte == 0), "data called zero at {at}");
        at += u64::from(run);
    }
    assert!(at <= offset + u64::from(length));
}

fn play(device: Arc<dyn BlockDevice>, steps: &[Step]) {
    let server = Server::new(device);
    let mut client = Client::connect(&server.socket, "disk", true);
    let mut oracle = vec![0; SIZE as usize];
    for step in steps {
        match *step {
            Step::Read { offset, length, flags } => {
                let answer = client.call(READ, flags, offset, length, &[]);
                assert!(flags & DF == 0 || answer.chunks.len() <= 1, "in one piece");
                assert!(answer.data(offset, length as usize) == slice(&mut oracle, offset, length), "{step:?}");
            }
            Step::Write { offset, length, seed, fua } => {
                let data = noise(seed, length as usize);
                assert_eq!(client.call(WRITE, u16::from(fua), offset, length, &data).errno, 0, "{step:?}");
                slice(&mut oracle, offset, length).copy_from_slice(&data);
            }
            Step::Zero { offset, length, flags } => match client.call(WRITE_ZEROES, flags, offset, length, &[]).errno {
                0 => slice(&mut oracle, offset, length).fill(0),
                // The request may have failed half way; made good by writing.
                ENOTSUP if flags & FAST_ZERO != 0 => {
                    client.write(offset, &vec![0; length as usize]);
                    slice(&mut oracle, offset, length).fill(0);
                }
                errno => panic!("{step:?}: {errno}"),
            },
            Step::Trim { offset, length, fua } => {
                assert_eq!(client.call(TRIM, u16::from(fua), offset, length, &[]).errno, 0, "{step:?}");
                // In Twinsite a trimmed range reads as zeroes, or nothing happened at all.
                let now = client.read(offset, length as usize);
                let slice = slice(&mut oracle, offset, length);
                assert!(now == slice || now.iter().all(|&byte| byte == 0), "{step:?}");
                slice.copy_from_slice(&now);
            }
            Step::Status { offset, length, one } if length > 0 => {
                let answer = client.call(BLOCK_STATUS, if one { REQ_ONE } else { 0 }, offset, length, &[]);
                check_status(&mut oracle, offset, length, one, &answer);
            }
            Step::Status { .. } => {}
            Step::Cache { offset, length } => assert_eq!(client.call(CACHE, 0, offset, length, &[]).errno, 0),
            Step::Flush => assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).errno, 0),
        }
    }
    assert!(client.read(0, SIZE as usize) == oracle, "the whole disk at the end");
    client.disconnect();
    wait_closed(&server);
}

fn wait_closed(server: &Server) {
    server.wait(server.server.shutdown());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_as_the_oracle(steps in prop::collection::vec(step(), 1..60)) {
        play(Arc::new(MemoryDevice::new(SIZE)), &steps);
    }

    #[test]
    fn a_file_is_as_the_oracle(steps in prop::collection::vec(step(), 1..60)) {
        let folder = tempfile::tempdir().unwrap();
        play(file_device(folder.path(), SIZE, false), &steps);
        prop_assert_eq!(std::fs::metadata(folder.path().join("disk.raw")).unwrap().len(), SIZE);
    }

    #[test]
    fn a_file_past_the_cache_is_as_the_oracle(steps in prop::collection::vec(step(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        play(file_device(folder.path(), SIZE, true), &steps);
        prop_assert_eq!(std::fs::metadata(folder.path().join("disk.raw")).unwrap().len(), SIZE);
    }
}

/// Many unaligned writes in flight at once that share blocks but no byte: all must be there in the end. Catches a
/// read-modify-write that puts a neighbour's old bytes back.
fn neighbours(device: Arc<dyn BlockDevice>) {
    const PIECE: usize = 700;
    let server = Server::new(device);
    let expected = noise(3, SIZE as usize / PIECE * PIECE);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::connect(&server.socket, "disk", false)).collect();
    // In turn: neighbouring pieces come from different connections, on different threads, all in flight together.
    for (index, piece) in expected.chunks(PIECE).enumerate() {
        let client = &mut clients[index % 4];
        client.send_request(WRITE, 0, (index * PIECE) as u64, PIECE as u32, piece);
    }
    for index in 0..expected.len() / PIECE {
        assert_eq!(clients[index % 4].answer(0).errno, 0);
    }
    assert!(clients[0].read(0, expected.len()) == expected);
}

#[test]
fn neighbours_in_one_block_keep_their_bytes_in_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    neighbours(file_device(folder.path(), SIZE, false));
}

#[test]
fn neighbours_in_one_block_keep_their_bytes_past_the_page_cache() {
    let folder = tempfile::tempdir().unwrap();
    neighbours(file_device(folder.path(), SIZE, true));
}
