//! A node starts with a disk that hangs: everybody else is served meanwhile.
//!
//! Would catch: groups that are started one after the other, a start that is over only when all of them are there, guests that are turned away
//! before their disk is there, a group that comes late and is not taken in, an address that is opened before all of its disks are there, or never, a stop that waits for one that never comes.

mod support;

use std::time::{Duration, Instant};

use support::block::{Disk, TOOLS};
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Node, free_address, group_config};
use support::site::Site;
use support::{eventually, need, need_root, noise, one_at_a_time, sparse};

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_that_hangs_at_the_start_holds_up_its_own_guests_alone() {
    need_root();
    need(TOOLS);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    // The disk that will hang: an export of another node, as a file.
    let mut storage = Node::new(site.folder.path(), "storage");
    let (behind, socket) = (storage.folder.join("behind.raw"), storage.folder.join("behind.sock"));
    sparse(&behind, 8 * MIB);
    storage.configure(&group_config("behind", &free_address(), &site.receiver_key, "1s", &[("data", &behind, &socket)]));
    storage.start();
    let mut disk = Disk::attach(site.folder.path(), "slow", &socket, "data");
    // First in the file, so that it would be in the way of the others. One of them shares its address.
    let (image, beside) = (site.image("image.raw", 8 * MIB), site.image("beside.raw", 8 * MIB));
    let disks = [("other", beside.as_path(), &*site.socket("late"))];
    let beside = group_config("beside", &site.listen, &site.receiver_key, "50ms", &disks);
    site.primary.configure(&(site.group("late", disk.file()) + &beside + &site.group("good", &image)));
    site.receiver.start();
    site.primary.start();
    site.goes_on("good", 1);
    site.goes_on("late", 2);
    site.primary.kill();

    disk.stand_still();
    let began = Instant::now();
    site.primary.launch();
    let mut guest = served(&site, "good");
    guest.write(MIB, &noise(3, MIB as usize)).expect("a write");
    println!("the other group's guest was served after {:?}", began.elapsed());
    assert!(!is_ready(&site.primary), "before the node gave up waiting:\n{}", site.primary.log());
    assert!(site.primary.answers(), "{}", site.primary.log());
    println!("the node was ready after {:?}", began.elapsed());
    let late = site.primary.primary("late");
    assert_eq!(late["run"], "waiting", "{late:#}");
    assert!(late["reason"].as_str().is_some_and(|reason| reason.contains("its guests wait")), "{late:#}");
    assert!(site.primary.cli(&["status"]).contains("waiting: its disks"));
    site.goes_on("good", 4);
    // Guests that come back early wait at the address, also for a disk that is there: it is not the only one.
    let early = ["data", "other"].map(|disk| {
        let socket = site.socket("late");
        std::thread::spawn(move || {
            let mut guest = Nbd::connect(&socket, disk).expect("the export, once it is there");
            guest.write(0, &noise(5, MIB as usize)).expect("a write");
        })
    });
    std::thread::sleep(Duration::from_millis(500));
    assert!(early.iter().all(|guest| !guest.is_finished()), "the disk still hangs");
    disk.go_on();
    early.into_iter().for_each(|guest| guest.join().expect("served"));
    eventually("the group is taken in", COMMIT_WITHIN, || (site.primary.primary("late")["run"] == "running").then_some(()));
    site.primary.committed("late");
    site.primary.stop();

    // Who is told to stop meanwhile does not wait for it.
    disk.stand_still();
    site.primary.launch();
    drop(served(&site, "good"));
    let began = Instant::now();
    site.primary.stop();
    println!("stopped after {:?}", began.elapsed());
    assert!(!is_ready(&site.primary), "it was told before:\n{}", site.primary.log());

    // It fails in the end, when the node is ready already.
    site.primary.launch();
    assert!(site.primary.answers(), "{}", site.primary.log());
    assert_eq!(site.primary.primary("late")["run"], "waiting");
    disk.lose();
    let failed = eventually("the group has failed", COMMIT_WITHIN, || {
        let late = site.primary.primary("late");
        (late["run"] == "failed").then_some(late)
    });
    println!("{}", failed["error"]);
    assert!(failed["error"].as_str().is_some_and(|error| error.contains(disk.file().to_str().expect("UTF-8"))), "{failed:#}");
    drop(Nbd::connect(&site.socket("late"), "other").expect("nothing else is waited for there"));
    site.goes_on("good", 6);
    site.copy_equals("late", &behind);
}

/// A guest of the group, once it is served.
fn served(site: &Site, group: &str) -> Nbd {
    eventually("a guest is served", Duration::from_secs(20), || Nbd::connect(&site.socket(group), "data").ok())
}

fn is_ready(node: &Node) -> bool {
    node.log().lines().any(|line| line == "ready")
}
