//! Thinning seen by readers, by a full disk, by damage, and by a clock that moves through 40 days.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::{EpochId, Generation, Point};

use super::primary::{GROUP, Primary, SIZES, Volumes, client, greet, open, open_with, read_all, read_at, send};
use super::sweep::folder;
use super::{Replica, SimDisk};
use crate::view::View;

const ALL: Duration = Duration::from_secs(1 << 30);

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

/// Epochs of one frame and of two, so that segments end between them, and what each of them shows.
fn scene(replica: &mut Replica, epochs: u64) -> Vec<Volumes> {
    let mut primary = Primary::new(5);
    let (session, _) = greet(replica, &primary).unwrap();
    let mut images = vec![primary.now.clone()];
    for number in 1..=epochs {
        let epoch = primary.epoch(&[1 + (number % 2) as usize]);
        send(replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        images.push(primary.now.clone());
    }
    images
}

/// Thins until nothing is left to thin. Returns the points that are gone.
fn thin_all(replica: &mut Replica, every: Duration) -> Vec<Point> {
    let mut gone = Vec::new();
    while let Some(plan) = replica.plan(GROUP, every).unwrap() {
        replica.thin(GROUP, &plan, |_| ()).unwrap();
        gone.extend(plan.drop);
    }
    gone
}

fn check(replica: &Replica, images: &[Volumes], gone: &[Point], what: &str) {
    let all = read_all(replica).unwrap();
    let due: Vec<Point> = (1..images.len() as u64).map(point).filter(|p| !gone.contains(p)).collect();
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), due, "{what}");
    for (point, volumes) in all {
        assert_eq!(volumes, images[point.epoch.0 as usize], "{point} {what}");
    }
}

/// Would catch a view that reads the old place of a frame in the new file, a block that is thrown away although a point needs it, numbers of frames that differ
/// between an index from before, one that is built after, and one that a start builds, and a pinned or named point that is thinned away.
#[test]
fn views_from_before_read_the_same_after_and_what_is_looked_at_stays() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 40);
    let used = || -> u64 {
        let listed = crate::journal::list_journal(&dir.path().join("store/a/db/journal"), 0).unwrap();
        assert_eq!(listed.dead, Vec::<std::path::PathBuf>::new());
        listed.live.iter().map(|segment| segment.bytes).sum()
    };
    let before: Vec<(u64, Vec<View>)> = [6, 7, 15, 40].map(|e| (e, replica.views(GROUP, point(e)).unwrap())).into();
    replica.name(GROUP, point(20), &"keep".parse().unwrap()).unwrap();
    let had = used();
    // A few points an interval first, then what was thinned again, and all of it.
    let mut gone = thin_all(&mut replica, Duration::from_micros(4));
    assert!(gone.len() > 10, "{gone:?}");
    check(&replica, &images, &gone, "thinned");
    gone.extend(thin_all(&mut replica, ALL));
    check(&replica, &images, &gone, "thinned again");
    for stays in [6, 7, 15, 20, 40] {
        assert!(!gone.contains(&point(stays)), "point {stays}");
    }
    for (epoch, views) in &before {
        assert_eq!(read(views), images[*epoch as usize], "epoch {epoch}");
    }
    assert!(gone.len() > 20 && used() + 10_000 < had, "{} points, {} of {had} bytes", gone.len(), used());
    drop((before, replica));
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    check(&replica, &images, &gone, "after a start");
    // Nothing looks at them any more, but a frame is rewritten once a rung; folding goes on over what was thinned.
    let kept = |replica: &Replica| replica.points(GROUP).unwrap();
    let to = kept(&replica)[3];
    replica.fold(GROUP, to).unwrap();
    gone.extend(
        kept(&replica)
            .first()
            .map(|first| (1..first.epoch.0).map(point))
            .unwrap()
            .filter(|p| !gone.contains(p))
            .collect::<Vec<_>>(),
    );
    check(&replica, &images, &gone, "folded");
    drop(replica);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    check(&replica, &images, &gone, "folded and started");
    gone.extend(thin_all(&mut replica, ALL * 2));
    check(&replica, &images, &gone, "thinned behind the base");
}

/// Would catch points that are taken away from somebody who began to look at them, or named them, while the new segment was written.
#[test]
fn who_looks_at_a_point_while_it_is_thinned_keeps_it() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 20);
    let plan = replica.plan(GROUP, ALL).unwrap().unwrap();
    let dropped = *plan.drop.first().unwrap();
    let mut views = None;
    let refused = replica.thin(GROUP, &plan, |replica| views = Some(replica.views(GROUP, dropped).unwrap())).unwrap_err();
    assert!(refused.to_string().contains("somebody needs it now"), "{refused}");
    assert_eq!(read(&views.unwrap()), images[dropped.epoch.0 as usize]);
    check(&replica, &images, &[], "refused");
    let building = dir.path().join("store/a/db/journal/0000000001.thin");
    assert!(!building.exists());
    // It is planned again as before.
    let plan = replica.plan(GROUP, ALL).unwrap().unwrap();
    replica.thin(GROUP, &plan, |_| assert!(building.exists())).unwrap();
    let gone: Vec<Point> = plan.drop.into_iter().collect();
    assert!(gone.contains(&dropped));
    check(&replica, &images, &gone, "thinned");
}

/// A full disk and a failing sync harm nothing: the old segments are what is read, also after a start, and it is done again.
#[test]
fn what_does_not_come_to_its_end_harms_nothing() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 20);
    for room in [Some(0), Some(1000), Some(2500), None] {
        let plan = replica.plan(GROUP, ALL).unwrap().unwrap();
        disk.set_room(room);
        if room.is_none() {
            disk.fail_next_sync();
        }
        let failed = replica.thin(GROUP, &plan, |_| ()).unwrap_err().to_string();
        assert!(failed.contains("0000000001.thin: cannot ") && !failed.contains('\n'), "{failed}");
        disk.set_room(None);
        check(&replica, &images, &[], &failed);
    }
    drop(replica);
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    check(&replica, &images, &[], "after a start");
    let gone = thin_all(&mut replica, ALL);
    assert!(!gone.is_empty());
    check(&replica, &images, &gone, "thinned at last");
}

/// Would catch damage that is packed anew under a good checksum, or that thinning throws away with a whole range of points.
#[test]
fn damage_stays_damage() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut replica = open(dir.path(), disk.disk()).unwrap();
    let images = scene(&mut replica, 20);
    // The payload of the first frame.
    disk.flip(std::path::Path::new("store/a/db/journal/0000000001.seg"), 200, 3).unwrap();
    let gone = thin_all(&mut replica, ALL);
    drop(replica);
    let replica = open(dir.path(), disk.disk()).unwrap();
    let (mut whole, mut failed) = (0, 0);
    for epoch in replica.points(GROUP).unwrap() {
        match read_at(&replica, epoch) {
            Ok(volumes) => {
                assert_eq!(volumes, images[epoch.epoch.0 as usize], "{epoch}");
                whole += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("is damaged"), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0 && whole > 0 && !gone.is_empty(), "{failed} of {} points", whole + failed);
}

const MINUTE_US: u64 = 60_000_000;
const HOUR_US: u64 = 60 * MINUTE_US;
const DAY_US: u64 = 24 * HOUR_US;

/// A clock that moves through 40 days with bursts of points, the keeper beside it, a start now and then, names and a view that come and go: every point that the
/// ladder keeps is there and shows what the oracle remembers of that cut; of the others hardly any are left; and no frame is rewritten twice on a rung.
#[test]
fn forty_days_leave_what_each_rung_keeps() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let again = || open_with(dir.path(), disk.disk(), client(None), 300_000).unwrap();
    let mut replica = again();
    let mut primary = Primary::new(13);
    let (mut session, _) = greet(&mut replica, &primary).unwrap();
    let (mut images, mut cuts) = (BTreeMap::new(), Vec::<u64>::new());
    let begin = 20_000 * DAY_US;
    let (mut now, mut thinned, mut early, mut next_start) = (begin, 0, 0, begin + 3 * DAY_US);
    let mut view: Option<(u64, Vec<View>)> = None;
    while now < begin + 40 * DAY_US {
        // Four points within a minute, then nothing for a quarter of an hour.
        now += if cuts.len().is_multiple_of(4) { 15 * MINUTE_US } else { 11_000_000 };
        primary.clock_unix_us = now;
        let epoch = primary.epoch(&[1]);
        send(&mut replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        cuts.push(now);
        images.insert(epoch.point.epoch.0, primary.now.clone());
        if !cuts.len().is_multiple_of(4) {
            continue;
        }
        let status = replica.tend(GROUP, now).unwrap();
        assert_eq!(status.last_error, None);
        if now < next_start {
            continue;
        }
        next_start += 3 * DAY_US;
        (thinned, early) = (thinned + status.thinned_points, early + status.early_thins + status.early_folds);
        let points: Vec<u64> = replica.points(GROUP).unwrap().iter().map(|p| p.epoch.0).collect();
        let kept = crate::Ladder::default().kept(&cuts, now);
        let due: Vec<u64> = (1..).zip(&kept).filter(|(_, kept)| **kept).map(|(epoch, _)| epoch).collect();
        for epoch in &due {
            assert!(points.contains(epoch), "epoch {epoch} is kept by the ladder");
        }
        // What is in the youngest segments of each rung, and the last point of each segment.
        assert!(points.len() < due.len() + 250, "{} points, {} of the ladder", points.len(), due.len());
        for epoch in &points {
            assert_eq!(read_at(&replica, point(*epoch)).unwrap(), images[epoch], "epoch {epoch}");
        }
        images.retain(|epoch, _| points.contains(epoch));
        if let Some((epoch, views)) = view.take() {
            assert_eq!(read(&views), images[&epoch], "the view of epoch {epoch}");
        }
        if ((next_start - begin) / DAY_US).is_multiple_of(2) {
            drop(replica);
            replica = again();
            (session, _) = greet(&mut replica, &primary).unwrap();
        } else {
            // A point that the ladder lets go soon.
            let looked_at = points[points.len() - 2];
            view = Some((looked_at, replica.views(GROUP, point(looked_at)).unwrap()));
        }
    }
    assert!(thinned > 5000 && early == 0, "{thinned} points were left out; {early} times for want of space");
}

/// A group with a limit of its own: it is kept within it by leaving points out first, and says so; the newest point is never given up, and another group of the
/// client takes what it likes.
#[test]
fn a_group_short_of_space_leaves_points_out_earlier() {
    let dir = folder();
    let disk = SimDisk::new(dir.path());
    let mut client = client(None);
    client.group_space_max_bytes.insert("db".parse().unwrap(), 600_000);
    let mut replica = open_with(dir.path(), disk.disk(), client, 60_000).unwrap();
    let mut primary = Primary::new(12);
    let (session, _) = greet(&mut replica, &primary).unwrap();
    let mut images = vec![primary.now.clone()];
    for number in 1..=1500_u64 {
        primary.clock_unix_us = 1_000_000_000 + number;
        let epoch = primary.epoch(&[1]);
        send(&mut replica, session, &epoch).unwrap();
        primary.committed = epoch.point.epoch;
        images.push(primary.now.clone());
        replica.tend(GROUP, primary.clock_unix_us).unwrap();
    }
    let status = replica.tend(GROUP, primary.clock_unix_us).unwrap();
    assert!(status.early_thins > 10 && status.thinned_points > 500, "{status:?}");
    // All of it is within ten minutes: without the limit every point would be there.
    let all = read_all(&replica).unwrap();
    assert!(all.contains_key(&point(1500)) && all.len() > 20, "{} points", all.len());
    assert!(all.iter().all(|(point, volumes)| *volumes == images[point.epoch.0 as usize]));
    let used: u64 =
        crate::journal::list_journal(&dir.path().join("store/a/db/journal"), 0).unwrap().live.iter().map(|s| s.bytes).sum();
    assert!(used <= 600_000, "{used} bytes");
    // A name on the oldest point and views of many: the space ends, and the newest stays.
    let mut views: Vec<_> = all.keys().map(|point| replica.views(GROUP, *point).unwrap()).collect();
    let refused = (1501..=2500).find_map(|number| {
        primary.clock_unix_us = 1_000_000_000 + number;
        let epoch = primary.epoch(&[3]);
        let sent = send(&mut replica, session, &epoch);
        primary.committed = epoch.point.epoch;
        // Each new point is looked at, too.
        if sent.is_ok() {
            views.push(replica.views(GROUP, epoch.point).unwrap());
        }
        replica.tend(GROUP, primary.clock_unix_us).unwrap();
        sent.err()
    });
    let refused = refused.expect("the space has no end");
    assert!(refused.contains("group 'a/db' has used its 600000 bytes of space: raise its `space_max`"), "{refused}");
}
