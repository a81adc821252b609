//! Folding seen by readers: who looks at a point goes on seeing it, before, during and after a fold.

use proto::{EpochId, Generation, Point};

use super::primary::{GROUP, Primary, SIZES, Volumes, greet, open, open_within, read_all, read_at, send};
use super::sweep::folder;
use super::{Replica, SimDisk};
use crate::view::View;

fn point(epoch: u64) -> Point {
    Point { generation: Generation(1), epoch: EpochId(epoch) }
}

fn read(views: &[View]) -> Volumes {
    let mut volumes = SIZES.map(|bytes| vec![0xee; bytes]);
    for (view, bytes) in views.iter().zip(&mut volumes) {
        view.read_now(0, bytes).unwrap();
    }
    volumes
}

/// Epochs, and what each of them shows; the last ones are small, so that segments end between them.
pub(super) fn scene(replica: &mut Replica, epochs: u64) -> Vec<Volumes> {
    let mut primary = Primary::new(3);
    let (session, _) = greet(replica, &primary).unwrap();
    let mut images = vec![primary.now.clone()];
    for number in 1..=epochs {
        let epoch = primary.epoch(&[3 + (number % 3) as usize, 2]);
        send(replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        images.push(primary.now.clone());
    }
    images
}

/// Would catch a view that reads a folded frame's file, one that reads zeroes where the base is now, a base that has the blocks of a later
/// point, and an index that loses what was not folded.
#[test]
fn views_from_before_a_fold_read_the_same_after_it() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 9);
    let before: Vec<(u64, Vec<View>)> = (4..=9).map(|e| (e, replica.views(GROUP, point(e)).unwrap())).collect();
    let segments = || std::fs::read_dir(dir.path().join("store/a/db/journal")).unwrap().count();
    let (had, whole) = (segments(), replica.index_bytes(GROUP).unwrap());
    replica.fold(GROUP, point(3)).unwrap();
    replica.fold(GROUP, point(4)).unwrap();
    assert!(segments() + 2 < had, "nothing was freed: {} of {had} segments", segments());
    for (epoch, views) in &before {
        assert_eq!(read(views), images[*epoch as usize], "epoch {epoch}");
    }
    let all = read_all(&replica).unwrap();
    assert_eq!(all.keys().map(|p| p.epoch.0).collect::<Vec<_>>(), (4..=9).collect::<Vec<_>>());
    for (point, volumes) in all {
        assert_eq!(volumes, images[point.epoch.0 as usize], "{point}");
    }
    // The base is a plain file at its point.
    for (name, image) in ["root", "data"].iter().zip(&images[4]) {
        assert_eq!(&std::fs::read(dir.path().join(format!("store/a/db/base/{name}.raw"))).unwrap(), image);
    }
    // The index that was pruned holds no more than the one that a start builds: zeroes over zeroes of the base it does not need.
    let runs = |replica: &Replica| replica.index_bytes(GROUP).unwrap();
    let pruned = runs(&replica);
    assert!(pruned < whole, "{pruned} of {whole}");
    drop((before, replica));
    let replica = open(dir.path(), disk.disk()).unwrap();
    assert!(pruned <= runs(&replica));
    for (point, volumes) in read_all(&replica).unwrap() {
        assert_eq!(volumes, images[point.epoch.0 as usize], "{point} after a start");
    }
}

/// Would catch a fold that overwrites what a view reads, and a pin that outlives its view.
#[test]
fn a_view_holds_folding_back_while_it_lives() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 6);
    let first = replica.views(GROUP, point(2)).unwrap();
    let second = replica.views(GROUP, point(2)).unwrap();
    drop(second);
    let refused = replica.fold(GROUP, point(3)).unwrap_err().to_string();
    assert!(refused.contains("somebody looks at an earlier one"), "{refused}");
    replica.fold(GROUP, point(2)).unwrap();
    assert_eq!(read(&first), images[2]);
    let newest = replica.fold(GROUP, point(6)).unwrap_err().to_string();
    assert!(newest.contains("the newest point stays"), "{newest}");
    drop(first);
    replica.fold(GROUP, point(3)).unwrap();
    assert!(replica.views(GROUP, point(2)).is_err());
    assert!(replica.fold(GROUP, point(3)).is_err());
}

/// A full disk: the fold fails, is told, harms nothing, and is done again when there is room.
#[test]
fn a_fold_that_finds_no_room_harms_nothing() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 6);
    for (room, superblock) in [(0, 2 * 8192), (5000, 0), (9000, 0), (14_000, 0)] {
        // The superblock's own space is there, and is written the first time.
        disk.set_room(Some(superblock + room));
        let failed = replica.fold(GROUP, point(5)).unwrap_err().to_string();
        assert!(failed.contains("cannot write the base") && !failed.contains('\n'), "{failed}");
        disk.set_room(None);
        for (point, volumes) in read_all(&replica).unwrap() {
            assert_eq!(volumes, images[point.epoch.0 as usize], "{point} with room for {room} bytes");
        }
    }
    drop(replica);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    assert_eq!(replica.folding(GROUP).unwrap(), Some(point(5)));
    replica.fold(GROUP, point(5)).unwrap();
    let all = read_all(&replica).unwrap();
    assert_eq!(all.keys().map(|p| p.epoch.0).collect::<Vec<_>>(), [5, 6]);
    assert!(all.iter().all(|(point, volumes)| *volumes == images[point.epoch.0 as usize]));
}

const HOUR_US: u64 = 3_600_000_000;
const DAY: u64 = 24;

/// A clock that moves through 40 days, an epoch an hour, the keeper beside it, and a start every fifth day: every point that the ladder keeps is there and shows what the
/// oracle remembers of that cut, a named one too; what is beyond the ladder is gone, and the journal with it.
#[test]
fn forty_days_of_points_are_those_of_the_oracle() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let mut primary = Primary::new(11);
    let (mut session, _) = greet(&mut replica, &primary).unwrap();
    let mut images = vec![primary.now.clone()];
    let begin = 20_000 * DAY * HOUR_US;
    let (mut folds, mut freed) = (0, 0);
    for hour in 1..=40 * DAY {
        primary.clock_unix_us = begin + hour * HOUR_US;
        let epoch = primary.epoch(&[2]);
        send(&mut replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        images.push(primary.now.clone());
        let status = replica.tend(GROUP, primary.clock_unix_us).unwrap();
        assert_eq!(status.last_error, None);
        if hour == 35 * DAY {
            replica.name(GROUP, point(hour - 29 * DAY), &"keep".parse().unwrap()).unwrap();
        }
        if !hour.is_multiple_of(5 * DAY) {
            continue;
        }
        (folds, freed) = (folds + status.folds, freed + status.freed_bytes + status.thinned_freed_bytes);
        let points: Vec<u64> = replica.points(GROUP).unwrap().iter().map(|p| p.epoch.0).collect();
        let kept = crate::Ladder::default().kept(&(1..=hour).map(|h| begin + h * HOUR_US).collect::<Vec<_>>(), u64::MAX);
        for (epoch, _) in (1..=hour).zip(&kept).filter(|(_, kept)| **kept) {
            assert!(points.contains(&epoch), "epoch {epoch} is kept by the ladder in hour {hour}");
        }
        for epoch in points.iter().step_by(5).chain(points.last()) {
            assert_eq!(read_at(&replica, point(*epoch)).unwrap(), images[*epoch as usize], "epoch {epoch} in hour {hour}");
        }
        // A day of the last rung, and a segment.
        let oldest = hour.saturating_sub(if hour > 35 * DAY { 34 * DAY } else { 31 * DAY + 3 });
        assert!(points.first().is_some_and(|first| *first >= oldest), "{points:?} in hour {hour}");
        drop(replica);
        replica = open(dir.path(), disk.disk()).unwrap();
        (session, _) = greet(&mut replica, &primary).unwrap();
    }
    assert_eq!(replica.points(GROUP).unwrap().first(), Some(&point(6 * DAY)), "the named point is the base's");
    assert!(folds > 5 && freed > 400_000, "{folds} folds freed {freed} bytes");
}

/// Would catch a client that is refused although old points could make room, and one that loses its newest or a named point for it.
#[test]
fn a_client_short_of_space_gives_up_its_oldest_points() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open_within(dir.path(), disk.disk(), Some(150_000)).unwrap();
    let mut primary = Primary::new(12);
    let (session, _) = greet(&mut replica, &primary).unwrap();
    let mut images = vec![primary.now.clone()];
    let mut early = 0;
    for number in 1..=200_u64 {
        primary.clock_unix_us = 1_000_000_000 + number;
        let epoch = primary.epoch(&[3]);
        send(&mut replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        images.push(primary.now.clone());
        early = replica.tend(GROUP, primary.clock_unix_us).unwrap().early_folds;
    }
    assert!(early > 3, "{early} early folds");
    let all = read_all(&replica).unwrap();
    assert!(all.len() > 5 && all.contains_key(&point(200)), "{} points", all.len());
    assert!(all.iter().all(|(point, volumes)| *volumes == images[point.epoch.0 as usize]));
    // What has a name stays, and then the space ends.
    let oldest = *all.keys().next().unwrap();
    replica.name(GROUP, oldest, &"oldest".parse().unwrap()).unwrap();
    let refused = (201..=400).any(|number| {
        primary.clock_unix_us = 1_000_000_000 + number;
        let epoch = primary.epoch(&[3]);
        let sent = send(&mut replica, session, &epoch);
        primary.committed = epoch.point.epoch;
        replica.tend(GROUP, primary.clock_unix_us).unwrap();
        sent.is_err()
    });
    assert!(refused, "the space has no end");
    assert_eq!(replica.points(GROUP).unwrap().first(), Some(&oldest));
    assert_eq!(read_at(&replica, oldest).unwrap(), images[oldest.epoch.0 as usize]);
}
