//! The primary's address changes under load, as when its uplink changes or an address translation forgets it: the session goes on without
//! connecting again, and no point is lost.
//!
//! Would catch: a receiver that refuses to follow an address, a session that is begun anew or whose epoch is sent twice, a pass that
//! stalls when its path changes, points that are lost or wrong.

#[path = "support/relayed.rs"]
mod relayed;
mod support;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use receiver::PointInfo;
use relay::Path;
use relayed::{ETHERNET_PAYLOAD_BYTES, Relayed};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::COMMIT_WITHIN;
use support::stalls::Stalls;
use support::views::each_point;
use support::writers::{Target, Writers};
use support::{eventually, noise, one_at_a_time, scratch, seed};

const MIB: u64 = 1 << 20;
const GROUP: &str = "all";
/// Written by writers that remember, in blocks of a few KiB.
const OWN: [(&str, u64); 2] = [("left", MIB), ("right", MIB)];
/// Overwritten before each change, so that a pass is under way.
const BULK: (&str, u64) = ("bulk", 8 * MIB);
const WRITERS: u32 = 2;
/// Changes of the port, and of the address with it, in turns.
const CHANGES: u8 = 6;
/// Points to be committed after a change before the next.
const POINTS: u64 = 5;
/// A change costs a round trip and what was lost with the old path. A session that has to time out first takes 10 s.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(5);

/// What tells one session from another, at both ends. `peer` is the address that its session began from.
#[derive(Debug, PartialEq, Eq)]
struct Session {
    peer: Value,
    epochs_merged: Value,
    begun_at_the_receiver: usize,
    links_of_the_primary: usize,
}

impl Session {
    fn of(site: &Relayed) -> Self {
        let lines = |log: String, word: &str| log.lines().filter(|line| line.contains(word)).count();
        let session = Self {
            peer: site.copy()["peer"].clone(),
            epochs_merged: site.primary()["epochs_merged"].clone(),
            begun_at_the_receiver: lines(site.pair.receiver.log(), "session in generation"),
            links_of_the_primary: lines(site.pair.primary.log(), "link"),
        };
        assert!(session.peer.is_string() && session.epochs_merged.is_u64(), "{session:?}");
        assert!(session.begun_at_the_receiver > 0 && session.links_of_the_primary > 0, "the logs tell: {session:?}");
        session
    }
}

#[test]
fn a_session_follows_its_primary_to_another_address() {
    let _alone = one_at_a_time();
    let folder = scratch();
    let seed = seed();
    let disks = [OWN[0], OWN[1], BULK];
    let mut site = Relayed::new(folder.path(), GROUP, "100ms", &disks, seed);
    site.relay.set_both(Path {
        delay: Duration::from_millis(10),
        rate_bits_per_s: Some(50_000_000),
        payload_bytes_max: Some(ETHERNET_PAYLOAD_BYTES),
        ..Path::default()
    });
    site.pair.primary.start();
    site.committed(COMMIT_WITHIN);
    let targets: Vec<_> = OWN
        .iter()
        .zip(&site.pair.sockets)
        .map(|((name, bytes), socket)| Target { socket: socket.clone(), export: (*name).to_owned(), blocks: bytes / 4096 })
        .collect();
    let mut writers = Writers::start(&targets, WRITERS, seed);
    let epochs = |site: &Relayed| site.primary()["epochs_committed"].as_u64().expect("a number");
    let begun = epochs(&site);
    eventually("commits under load", COMMIT_WITHIN, || (epochs(&site) >= begun + POINTS).then_some(()));

    let session = Session::of(&site);
    let before: BTreeSet<_> = site.pair.receiver.points(GROUP).into_iter().collect();
    let mut bulk = Nbd::connect(&site.pair.sockets[2], BULK.0).expect("the export");
    let stalls = Stalls::start();
    for n in 1..=CHANGES {
        for (at, piece) in (0..).step_by(MIB as usize).zip(noise(seed ^ u64::from(n), BULK.1 as usize).chunks(MIB as usize)) {
            bulk.write(at, piece).expect("a write");
        }
        eventually("the bulk is being sent", COMMIT_WITHIN, || {
            let busy = site.primary()["queues"]
                .as_array()
                .expect("queues")
                .iter()
                .any(|queue| queue["name"] == "epochs-in-flight" && queue["used"].as_u64() > Some(0));
            busy.then_some(())
        });
        let (old, at) = (site.relay.sources().expect("addresses"), epochs(&site));
        if n % 2 == 0 { site.relay.rebind_at(IpAddr::from([127, 0, 0, n])) } else { site.relay.rebind() }
            .expect("another address");
        let (changed, new) = (Instant::now(), site.relay.sources().expect("addresses"));
        assert!(old[0] != new[0], "the server sees {new:?} now");
        eventually("commits go on", FOLLOWED_WITHIN + COMMIT_WITHIN, || (epochs(&site) >= at + POINTS).then_some(()));
        let took = stalls.ran_since(changed);
        println!("{} to {}: {POINTS} points in {took:.2?}", old[0], new[0]);
        assert_eq!(Session::of(&site), session, "the session goes on");
        assert!(took < FOLLOWED_WITHIN, "{took:?}");
        writers.fine();
    }
    drop(bulk);
    writers.stop();
    site.pair.primary.settled(GROUP);
    assert_eq!(Session::of(&site), session, "the session goes on");

    // Every point of before is there, and every point since, without a gap; and each holds what its cut promises.
    let points = site.pair.receiver.points(GROUP);
    assert!(before.iter().all(|point| points.contains(point)), "points of before are lost");
    let numbers: Vec<u64> =
        points.iter().map(|(name, _)| name.split_once('.').and_then(|(_, n)| n.parse().ok()).expect("g.e")).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "points are missing: {numbers:?}");
    let newest = points.last().expect("a point").0.clone();
    site.pair.primary.stop();
    site.pair.receiver.stop();
    let history = writers.history();
    let mut checked = 0;
    let all = |_: &PointInfo| true;
    each_point(&site.pair.store, GROUP, all, |info, disks| {
        let images: Vec<_> = disks.iter().map(|disk| disk.read(0, disk.size() as usize)).collect();
        let own = history.check(info.cut_unix_us, &images[..OWN.len()]);
        let written = own.unwrap_or_else(|error| panic!("point {}: {error}", info.point));
        checked += 1;
        if info.point.to_string() == newest {
            assert!(written > 0, "the newest point holds writes");
            for (image, file) in images.iter().zip(&site.pair.images) {
                assert!(*image == std::fs::read(file).expect("the image"), "{}: the newest point differs", file.display());
            }
        }
    });
    println!("{checked} points from {} on are right", numbers[0]);
    assert_eq!(checked, points.len());
}
