//! The simulation itself: bytes in, bytes out, crashes and faults.

use proto::fencing::GroupRole;
use proto::{EpochId, Generation, Message, Point};
use rand::{Rng, SeedableRng};

use super::primary::{EpochBytes, GROUP, Primary, greet, messages, open, read_all, read_at, send, send_passes};
use super::{Replica, SimDisk};

/// Everything that is not durable is lost.
fn lose(n: u32) -> u32 {
    n.min(3) - 1
}

fn next(primary: &mut Primary, replica: &mut Replica, session: super::SessionNo) -> EpochBytes {
    let epoch = primary.epoch(&[3, 1]);
    send(replica, session, &epoch).unwrap();
    primary.committed = epoch.point.epoch;
    epoch
}

/// Would catch a commit that is answered before it is durable, and a view that shows what was never sealed.
#[test]
fn a_committed_epoch_survives_power_loss_and_an_unsealed_one_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::new(dir.path());
    let mut primary = Primary::new(1);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let (session, committed) = greet(&mut replica, &primary).unwrap();
    assert_eq!(committed, None);
    let first = next(&mut primary, &mut replica, session);
    let kept = primary.now.clone();
    let unsealed = primary.epoch(&[2]);
    send_passes(&mut replica, session, &unsealed, 1000);
    drop(replica);
    disk.crash(lose).unwrap();

    let replica = open(dir.path(), disk.disk()).unwrap();
    assert_eq!(replica.points(GROUP).unwrap(), [first.point]);
    assert_eq!(read_at(&replica, first.point).unwrap(), kept);
    let part = replica.read_view(GROUP, first.point, 1, 100, 5000).unwrap();
    assert_eq!(part, kept[1][100..5100]);
    assert_eq!(replica.generation(GROUP).unwrap(), (Generation(1), GroupRole::Replica, None));
}

/// However the bytes of a session are cut, and in whatever order seal, streams and resets overtake each other, the same
/// points come out.
#[test]
fn streams_wait_for_their_turn() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::new(dir.path());
    let mut primary = Primary::new(2);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let session = replica.connect(super::primary::key()).unwrap();
    for byte in primary.hello() {
        replica.control(session, &[byte]);
    }
    assert!(matches!(messages(&mut replica, session).as_slice(), [Ok(Message::Welcome { .. })]));
    let first = primary.epoch(&[2, 2]);
    primary.committed = first.point.epoch;
    let second = primary.epoch(&[1]);
    // Both epochs' streams are open before any of them has ended, and the seals come before the frames.
    let abandoned = replica.pass_open(session);
    replica.pass_data(session, abandoned, &first.passes[0][..100]);
    replica.pass_reset(session, abandoned);
    replica.control(session, &first.seal);
    let streams: Vec<_> = first.passes.iter().chain(&second.passes).map(|p| (replica.pass_open(session), p)).collect();
    for (stream, pass) in streams.iter().rev() {
        for piece in pass.chunks(700) {
            replica.pass_data(session, *stream, piece);
        }
    }
    for (stream, _) in streams.iter().rev() {
        replica.pass_end(session, *stream);
    }
    replica.control(session, &second.seal);
    let due = [first.point, second.point].map(|point| Ok(Message::Committed { point }));
    assert_eq!(messages(&mut replica, session), due);
    assert_eq!(read_all(&replica).unwrap().last_key_value().unwrap().1, &primary.now);
    // The clean stop tells the session.
    let outputs = replica.stop();
    assert!(outputs.iter().any(|(s, o)| *s == session && matches!(o, super::Output::Closed { .. })));
}

/// A full disk costs the epoch, a failed sync the session until the next start, a flipped bit an error and not data.
#[test]
fn faults_are_injected_and_survived() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::new(dir.path());
    let mut primary = Primary::new(3);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let (session, _) = greet(&mut replica, &primary).unwrap();
    next(&mut primary, &mut replica, session);
    let before = primary.clone();
    disk.set_room(Some(100));
    let full = primary.epoch(&[3]);
    assert!(send(&mut replica, session, &full).unwrap_err().contains("no storage space"));
    disk.set_room(None);
    primary = before;
    let (session, committed) = greet(&mut replica, &primary).unwrap();
    assert_eq!(committed.map(|p| p.epoch), Some(EpochId(1)));
    next(&mut primary, &mut replica, session);
    disk.fail_next_sync();
    let before = primary.clone();
    let failed = primary.epoch(&[1]);
    assert!(send(&mut replica, session, &failed).is_err());
    primary = before;
    assert!(greet(&mut replica, &primary).unwrap_err().contains("a sync of the journal failed"));
    // Started again without a power loss: the page cache has the whole epoch and calls it clean, and the disk does not.
    drop(replica);
    disk.restart();
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let (session, committed) = greet(&mut replica, &primary).unwrap();
    assert_eq!(committed.map(|p| p.epoch), Some(EpochId(2)), "a failed sync was believed");
    next(&mut primary, &mut replica, session);
    drop(replica);
    // In the header of the first frame.
    disk.flip(std::path::Path::new("store/a/db/journal/0000000001.seg"), 70, 2).unwrap();
    let replica = open(dir.path(), disk.disk()).unwrap();
    let [(_, Some(refused))] = &replica.groups()[..] else { panic!("a flipped bit was believed") };
    assert!(refused.contains("0000000001.seg: at offset 64: "), "{refused}");
}

/// A disk that is full after any number of bytes, from the creation of the group on, costs one epoch or one hello, leaves nothing
/// behind, and forgets nothing that was answered.
#[test]
fn a_disk_full_at_any_byte_costs_one_epoch() {
    for room in (0..44_000).step_by(397) {
        let dir = super::sweep::folder();
        let disk = SimDisk::new(dir.path());
        let mut primary = Primary::new(room);
        let mut replica = open(dir.path(), disk.disk()).unwrap();
        disk.set_room(Some(room));
        let created = greet(&mut replica, &primary).inspect_err(|error| {
            assert!(error.contains("no storage space"), "{error}");
            disk.set_room(None);
        });
        let (mut session, _) = created.or_else(|_| greet(&mut replica, &primary)).unwrap();
        let mut images = vec![];
        for _ in 0..6 {
            let before = primary.clone();
            let epoch = primary.epoch(&[2, 1, 1]);
            if let Err(error) = send(&mut replica, session, &epoch) {
                assert!(error.contains("no storage space"), "{error}");
                disk.set_room(None);
                primary = before;
                session = greet(&mut replica, &primary).unwrap().0;
                continue;
            }
            primary.committed = epoch.point.epoch;
            images.push((epoch.point, primary.now.clone()));
        }
        drop(replica);
        disk.crash(lose).unwrap();
        let replica = open(dir.path(), disk.disk()).unwrap();
        assert_eq!(read_all(&replica).unwrap().into_iter().collect::<Vec<_>>(), images, "room for {room} bytes");
    }
}

/// The same calls give the same changes of the disk, and the same choices the same crash: what makes a failure replayable.
#[test]
fn the_same_run_twice_is_the_same() {
    let run = || {
        let dir = super::sweep::folder();
        let disk = SimDisk::traced(dir.path());
        let mut primary = Primary::new(5);
        let mut rng = rand::rngs::SmallRng::seed_from_u64(5);
        let mut points = Vec::new();
        for _ in 0..4 {
            let mut replica = open(dir.path(), disk.disk()).unwrap();
            let (session, committed) = greet(&mut replica, &primary).unwrap();
            primary.committed = committed.map_or(EpochId(0), |p| p.epoch);
            next(&mut primary, &mut replica, session);
            let unsealed = primary.epoch(&[3, 3]);
            send_passes(&mut replica, session, &unsealed, 999);
            points.extend(replica.points(GROUP).unwrap());
            drop(replica);
            disk.crash(|n| rng.random_range(0..n)).unwrap();
        }
        let trace: Vec<String> = disk.trace().iter().map(|c| format!("{c:?}")).collect();
        (trace.join("\n").replace(&dir.path().display().to_string(), ""), points)
    };
    let (first, second) = (run(), run());
    assert_eq!(first.1.len(), 1 + 2 + 3 + 4);
    assert_eq!(first, second);
}

/// The process dies in the middle of a promotion: afterwards the generation is the old one or the new one, and a promotion
/// that was answered stays.
#[test]
fn a_promotion_survives_and_fences() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SimDisk::new(dir.path());
    let mut primary = Primary::new(4);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let (session, _) = greet(&mut replica, &primary).unwrap();
    let point: Point = next(&mut primary, &mut replica, session).point;
    assert_eq!(replica.promote(GROUP, None).unwrap(), (Generation(2), point));
    let said = messages(&mut replica, session);
    assert!(matches!(said.as_slice(), [Ok(Message::Fenced { generation: Generation(2) }), Err(_)]), "{said:?}");
    drop(replica);
    disk.crash(lose).unwrap();
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    assert_eq!(replica.generation(GROUP).unwrap(), (Generation(2), GroupRole::Active, Some(point)));
    assert!(greet(&mut replica, &primary).is_err());
}
