//! A split made on purpose, with real nodes: both sides are written, the connection is restored, and both timelines are read in full, byte for
//! byte, as files and over NBD; nothing is chosen without a person. Besides, points by their names.
//!
//! Would catch a kept fork that lacks a block, mixes the two sides, is changed by who looks at it, is lost by a restart or a failback, or goes
//! without being asked for; and a name that means another point than it was given to.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::{eventually, need, noise, run, scratch, seed, text};

const MIB: u64 = 1 << 20;
/// The second disk ends within a block.
const DISKS: &[(&str, u64)] = &[("root", 24 * MIB), ("logs", 3 * MIB + 700)];
const SOON: Duration = Duration::from_secs(30);

/// The content of the disks.
type Disks = Vec<Vec<u8>>;

/// Writes at random places of the disks at these sockets, and into `disks`.
fn write_some(sockets: &[&Path], disks: &mut Disks, random: &mut SmallRng, writes: usize) {
    let mut clients: Vec<Nbd> =
        sockets.iter().zip(DISKS).map(|(socket, (name, _))| Nbd::connect(socket, name).expect("an export")).collect();
    for _ in 0..writes {
        let disk = usize::from(random.random_bool(0.3));
        let length = random.random_range(1..30_000_u64);
        let offset = random.random_range(0..=DISKS[disk].1 - length);
        let content = if random.random_bool(0.1) { vec![0; length as usize] } else { noise(random.random(), length as usize) };
        clients[disk].write(offset, &content).expect("a write");
        disks[disk][offset as usize..(offset + length) as usize].copy_from_slice(&content);
    }
    clients.iter_mut().for_each(|client| client.flush().expect("a flush"));
}

fn images(pair: &Pair) -> Disks {
    pair.images.iter().map(|image| std::fs::read(image).expect("an image")).collect()
}

fn served(socket: &Path) -> Disks {
    let all = |(name, bytes): &(&str, u64)| {
        let mut nbd = Nbd::connect(socket, name).expect("the export");
        assert_eq!(nbd.size, *bytes);
        let pieces = (0..*bytes).step_by(MIB as usize).map(|at| nbd.read(at, MIB.min(bytes - at) as u32).expect("a read"));
        pieces.collect::<Vec<_>>().concat()
    };
    DISKS.iter().map(all).collect()
}

/// Exports every disk of what `of` says, as raw files.
fn exported(pair: &Pair, folder: &Path, of: &[&str]) -> Disks {
    let one = |(name, _): &(&str, u64)| {
        let to = folder.join(format!("{name}.exported"));
        let args = [&["export", "db", "--disk", name, "--force", "--to", path(&to)], of].concat();
        pair.receiver.json(&args);
        std::fs::read(&to).expect("the exported file")
    };
    DISKS.iter().map(one).collect()
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[track_caller]
fn same(found: &Disks, wanted: &Disks, what: &str) {
    for ((found, wanted), (name, _)) in found.iter().zip(wanted).zip(DISKS) {
        let differs = found.chunks(4096).zip(wanted.chunks(4096)).position(|(a, b)| a != b);
        assert_eq!((differs, found.len()), (None, wanted.len()), "{what}: disk {name} differs in that block");
    }
}

fn forks(pair: &Pair) -> Vec<Value> {
    pair.receiver.json(&["forks", "db"])["forks"].as_array().expect("a list").clone()
}

fn is_streaming(pair: &Pair) {
    eventually("the group streams", COMMIT_WITHIN, || (pair.primary.primary("db")["state"] == "streaming").then_some(()));
}

/// A split whose disks were given back: what the old primary had written of its own is kept.
struct Split {
    pair: Pair,
    /// Before the sites parted; its point is called `before-split`.
    common: Disks,
    /// What the old primary had.
    ours: Disks,
    /// What the active copy had, which is on the primary now.
    theirs: Disks,
}

impl Split {
    fn make(folder: &Path) -> Self {
        let mut random = SmallRng::seed_from_u64(seed());
        let mut pair = Pair::start(folder, "db", "50ms", DISKS);
        let mut common: Disks = DISKS.iter().map(|(_, bytes)| vec![0; *bytes as usize]).collect();
        let sockets: Vec<PathBuf> = pair.sockets.clone();
        let at_primary: Vec<&Path> = sockets.iter().map(PathBuf::as_path).collect();
        write_some(&at_primary, &mut common, &mut random, 300);
        pair.primary.settled("db");
        let point = pair.receiver.points("db").last().expect("a point").0.clone();
        pair.receiver.cli(&["points", "db", "--name", &point, "before-split"]);

        pair.receiver.kill();
        let mut ours = common.clone();
        write_some(&at_primary, &mut ours, &mut random, 80);
        pair.primary.kill();
        same(&images(&pair), &ours, "the old primary");
        pair.receiver.start();
        let active = folder.join("active.sock");
        pair.receiver.failover("db", None, &active);
        let mut theirs = common.clone();
        write_some(&[&active, &active], &mut theirs, &mut random, 120);
        pair.primary.start();
        eventually("the old primary is fenced", COMMIT_WITHIN, || {
            (pair.primary.primary("db")["state"] == "fenced").then_some(())
        });
        // Connected again, and nobody has chosen: each side has what it wrote.
        same(&images(&pair), &ours, "fenced");
        same(&served(&active), &theirs, "active");
        let given = pair.primary.json(&["failback", "db", "--yes"]);
        assert_eq!(given["handback"]["kept"], "diverged-1", "{given:#}");
        same(&images(&pair), &theirs, "after the failback");
        Self { pair, common, ours, theirs }
    }
}

#[test]
fn both_timelines_of_a_split_are_read_in_full() {
    need(&[("qemu-img", "qemu-utils"), ("nbdcopy", "libnbd-bin")]);
    let folder = scratch();
    let Split { mut pair, common, ours, theirs } = Split::make(folder.path());
    assert!(common[0] != ours[0] && ours[0] != theirs[0] && common[0] != theirs[0]);
    let listed = forks(&pair);
    let fork = &listed[0];
    let told = ["name", "client", "group"].map(|field| fork[field].as_str().expect("a text"));
    assert_eq!((listed.len(), told), (1, ["diverged-1", "primary", "db"]), "{listed:#?}");
    let point = pair.receiver.json(&["points", "db"])["points"]
        .as_array()
        .expect("points")
        .iter()
        .find_map(|p| (p["names"][0] == "before-split").then(|| p["point"].clone()));
    assert_eq!((Some(&fork["point"]), &fork["generation"]), (point.as_ref(), &Value::from(1)));
    let differing = |a: &Disks, b: &Disks| -> u64 {
        let blocks = |(a, b): (&Vec<u8>, &Vec<u8>)| a.chunks(4096).zip(b.chunks(4096)).filter(|(a, b)| a != b).count();
        a.iter().zip(b).map(blocks).sum::<usize>() as u64 * 4096
    };
    assert_eq!(fork["own_bytes"], differing(&common, &ours), "what differs, and no more");
    let shown = pair.receiver.cli(&["forks"]);
    assert!(shown.contains("diverged-1") && shown.contains("primary/db"), "{shown}");
    print!("{shown}");
    assert!(pair.receiver.cli(&["status"]).contains("diverged-1"), "status tells of it");

    let of_fork = ["--fork", "diverged-1"];
    same(&exported(&pair, folder.path(), &of_fork), &ours, "the kept fork as raw files");
    same(&exported(&pair, folder.path(), &[]), &theirs, "the newest point, which is the other timeline");
    let (qcow2, wanted) = (folder.path().join("root.qcow2"), folder.path().join("wanted.raw"));
    std::fs::write(&wanted, &ours[0]).expect("a file");
    let args = ["export", "db", "--fork", "diverged-1", "--disk", "root", "--format", "qcow2", "--to", path(&qcow2)];
    println!("{}", pair.receiver.cli(&args));
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", path(&wanted), path(&qcow2)]);

    // Over NBD, written to; two at once, and beside them a reader.
    let (a, b) = (folder.path().join("a.sock"), folder.path().join("b.sock"));
    for (name, socket) in [("a", &a), ("b", &b)] {
        let export = format!("unix:{}", socket.display());
        let begun = pair.receiver.json(&["drill", "db", "--fork", "diverged-1", "--name", name, "--export", &export]);
        assert_eq!((&begun["fork"], &begun["point"]), (&Value::from("diverged-1"), &fork["point"]), "{begun:#}");
        same(&served(socket), &ours, "the kept fork over NBD");
    }
    let mut written = ours.clone();
    write_some(&[&a, &a], &mut written, &mut SmallRng::seed_from_u64(5), 60);
    same(&served(&a), &written, "the drill that was written to");
    same(&served(&b), &ours, "the other drill");
    same(&exported(&pair, folder.path(), &of_fork), &ours, "the kept fork, beside drills of it");
    let in_use = pair.receiver.ask(&["forks", "--remove", "diverged-1", "--yes"]);
    assert!(!in_use.status.success() && text(&in_use).contains("is being read"), "{}", text(&in_use));
    assert!(pair.receiver.cli(&["drill", "list"]).contains("diverged-1"));
    pair.receiver.cli(&["drill", "end", "a", "b"]);

    // A script finds the same, and what it finds is not said of the point.
    let script = folder.path().join("same.sh");
    let body = format!(
        "#!/bin/sh\nset -e\nnbdcopy \"$TWINSITE_EXPORT_root\" - | cmp - {}\ntest \"$TWINSITE_FORK\" = diverged-1\n\
         nbdcopy - \"$TWINSITE_EXPORT_logs\" < /dev/zero 2> /dev/null || true\necho same\n",
        wanted.display()
    );
    std::fs::write(&script, body).expect("a script");
    run("chmod", &["755", path(&script)]);
    let ran = pair.receiver.json(&["drill", "db", "--fork", "diverged-1", "--run", path(&script)]);
    assert_eq!((&ran["result"]["outcome"], &ran["recorded"]), (&Value::from("passed"), &Value::from(false)), "{ran:#}");
    let results = pair.receiver.json(&["drill", "results", "db"]);
    assert_eq!(results["results"].as_array().map(Vec::len), Some(0), "{results:#}");

    // The other timeline goes on, and a restart forgets nothing.
    let mut goes_on = theirs.clone();
    let sockets: Vec<&Path> = pair.sockets.iter().map(PathBuf::as_path).collect();
    is_streaming(&pair);
    write_some(&sockets, &mut goes_on, &mut SmallRng::seed_from_u64(6), 40);
    pair.primary.settled("db");
    pair.receiver.kill();
    pair.receiver.start();
    let again = forks(&pair);
    let but_when = |fork: &Value| ["name", "point", "generation", "own_bytes", "space_bytes", "error"].map(|f| fork[f].clone());
    assert_eq!(again.iter().map(but_when).collect::<Vec<_>>(), listed.iter().map(but_when).collect::<Vec<_>>());
    same(&exported(&pair, folder.path(), &of_fork), &ours, "the kept fork after a restart");

    // Only a person removes it, who is asked.
    let unasked = pair.receiver.ask(&["forks", "--remove", "diverged-1"]);
    assert!(unasked.status.code() == Some(2) && text(&unasked).contains("nothing was changed"), "{}", text(&unasked));
    assert!(text(&unasked).contains("nothing else has them"), "{}", text(&unasked));
    assert_eq!(forks(&pair).len(), 1);
    let other = pair.receiver.ask(&["forks", "db", "--remove", "active-2", "--yes"]);
    assert!(other.status.code() == Some(1) && text(&other).contains("no fork active-2 is kept of group db"), "{}", text(&other));
    println!("{}", pair.receiver.cli(&["forks", "--remove", "diverged-1", "--yes"]));
    assert!(forks(&pair).is_empty() && !pair.store.join("primary/db/forks/diverged-1").exists());
    let gone =
        pair.receiver.ask(&["export", "db", "--fork", "diverged-1", "--disk", "root", "--to", path(&folder.path().join("x"))]);
    let said = text(&gone);
    assert!(gone.status.code() == Some(1) && said.contains("keeps no fork 'diverged-1'") && said.lines().count() == 1, "{said}");
    is_streaming(&pair);
    pair.primary.settled("db");
    same(&exported(&pair, folder.path(), &[]), &goes_on, "the other timeline, to the end");
}

/// Would catch a command that takes a point and not its name, or that goes by the name when it is of another point by then.
#[test]
fn a_name_of_a_point_does_wherever_a_point_does() {
    let folder = scratch();
    let Split { mut pair, common, theirs, .. } = Split::make(folder.path());
    let by_name = ["--point", "before-split"];
    same(&exported(&pair, folder.path(), &by_name), &common, "an export by name");
    let socket = folder.path().join("drill.sock");
    let export = format!("unix:{}", socket.display());
    pair.receiver.json(&["drill", "db", "--name", "named", "--point", "before-split", "--export", &export]);
    same(&served(&socket), &common, "a drill by name");
    pair.receiver.cli(&["drill", "end", "drill-named"]);
    let plan = pair.receiver.json(&["failover", "db", "--preview", "--point", "before-split"]);
    let like_a_point = pair.receiver.ask(&["points", "db", "--name", "before-split", "1.7"]);
    assert!(text(&like_a_point).contains("reads like a point"), "{}", text(&like_a_point));

    let one_line = |output: &std::process::Output, says: &str| {
        let said = text(output);
        assert!(output.status.code() == Some(1) && said.lines().count() == 1 && said.contains(says), "{said}");
    };
    let to = folder.path().join("none");
    for args in [
        &["failover", "db", "--preview", "--point", "nonesuch"][..],
        &["export", "db", "--disk", "root", "--to", path(&to), "--point", "nonesuch"],
        &["drill", "db", "--export", &export, "--point", "nonesuch"],
    ] {
        one_line(&pair.receiver.ask(args), "twinsite points");
    }
    is_streaming(&pair);
    one_line(&pair.primary.ask(&["rollback", "db", "--yes", "--point", "nonesuch"]), "no point named 'nonesuch'");
    let neither = pair.primary.ask(&["rollback", "db", "--yes", "--point", "no such"]);
    assert!(neither.status.code() == Some(2) && text(&neither).contains("a point is GENERATION.EPOCH"), "{}", text(&neither));
    same(&images(&pair), &theirs, "a rollback that was refused");
    let done = pair.primary.json(&["rollback", "db", "--yes", "--point", "before-split"]);
    assert!(done["handback"]["error"].is_null(), "{done:#}");
    same(&images(&pair), &common, "rolled back by name");

    pair.primary.kill();
    let active = folder.path().join("again.sock");
    assert_eq!(pair.receiver.failover("db", Some("before-split"), &active), plan["point"].as_str().expect("a point"));
    same(&served(&active), &common, "a failover by name");
    eventually("the kept fork is there all the while", SOON, || (forks(&pair).len() == 1).then_some(()));
}
