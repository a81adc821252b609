//! The README's steps for two machines, each in a network namespace with an address of its own: pair, protect a disk image, watch,
//! lose the first machine with everything that runs on it, fail over, read the data at the second.
//!
//! Would catch: steps that do not work as they are written, a copy that needs anything of the first machine, a session that
//! works on loopback only. It prints the transcript, which the README quotes.

mod support;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use support::{eventually, need, need_root, one_at_a_time, run, scratch};

const TOOLS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("nbdfuse", "libnbd-bin"),
    ("mount", "mount"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
];
/// Documentation addresses (RFC 5737); nothing outside of the two namespaces has or sees them.
const ALPHA: &str = "192.0.2.1";
const BETA: &str = "192.0.2.2";

/// A machine: a network namespace, a folder, and what was typed.
struct Machine {
    name: &'static str,
    namespace: String,
    folder: PathBuf,
    /// Mounted below the folder, in this order.
    mounts: Vec<&'static str>,
}

impl Machine {
    fn new(name: &'static str, parent: &std::path::Path) -> Self {
        let namespace = format!("ts-{name}-{}", std::process::id());
        run("ip", &["netns", "add", &namespace]);
        let machine = Self { name, namespace, folder: parent.join(name), mounts: Vec::new() };
        std::fs::create_dir(&machine.folder).expect("its folder");
        machine
    }

    fn command(&self, line: &str) -> Command {
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_twinsite"));
        let path = format!("{}:{}", program.parent().expect("a folder").display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).args(["--", "sh", "-c", line]);
        // Stands for /etc/twinsite/twinsite.toml: the two machines share a file system.
        command.env("PATH", path).env("TWINSITE_CONFIG", self.folder.join("twinsite.toml"));
        command.current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Types a line, and notes it with what it printed.
    #[track_caller]
    fn types(&self, transcript: &mut String, line: &str) -> String {
        let output = self.command(line).output().expect("nsenter");
        let printed = support::text(&output);
        let _ = writeln!(transcript, "{}# {line}", self.name);
        if !printed.is_empty() {
            // The temporary folder's name says nothing: the README quotes this.
            let short = printed.replace(&self.folder.to_string_lossy().into_owned(), "…");
            let _ = writeln!(transcript, "{}", short.trim_end());
        }
        let log = std::fs::read_to_string(self.folder.join("twinsite.log")).unwrap_or_default();
        assert!(output.status.success(), "{}: {}\n{transcript}\nlog: {log}", output.status, self.name);
        printed
    }

    /// Writes a file as an editor would.
    fn edits(&self, transcript: &mut String, file: &str, text: &str) {
        std::fs::write(self.folder.join(file), text).expect("a file");
        let _ = writeln!(transcript, "{}# cat {file}\n{}", self.name, text.trim_end());
    }

    /// SIGKILL to everything that runs here.
    fn dies(&self) {
        let alive = || run("ip", &["netns", "pids", &self.namespace]);
        for pid in alive().split_whitespace() {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
        eventually("everything in the namespace is gone", Duration::from_secs(10), || alive().trim().is_empty().then_some(()));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let quiet = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output();
            output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default()
        };
        for mount in self.mounts.iter().rev() {
            quiet("umount", &["--lazy", self.folder.join(mount).to_str().unwrap_or_default()]);
        }
        for pid in quiet("ip", &["netns", "pids", &self.namespace]).split_whitespace() {
            quiet("kill", &["-9", pid]);
        }
        quiet("ip", &["netns", "del", &self.namespace]);
    }
}

/// Joins the two with a cable.
fn connect(a: &Machine, b: &Machine) {
    let ends = [format!("tsa{}", std::process::id()), format!("tsb{}", std::process::id())];
    run("ip", &["link", "add", &ends[0], "netns", &a.namespace, "type", "veth", "peer", "name", &ends[1], "netns", &b.namespace]);
    for (machine, end, address) in [(a, &ends[0], ALPHA), (b, &ends[1], BETA)] {
        let network = machine.namespace.as_str();
        run("ip", &["-n", network, "addr", "add", &format!("{address}/24"), "dev", end]);
        run("ip", &["-n", network, "link", "set", end, "up"]);
        run("ip", &["-n", network, "link", "set", "lo", "up"]);
    }
}

/// The value of `key = "…"` as `id` prints it for pasting.
fn pasted(printed: &str) -> String {
    let line = printed.lines().find(|line| line.starts_with("peer_key = ")).expect("a line to paste");
    line.trim_start_matches("peer_key = ").trim_matches('"').to_owned()
}

#[test]
fn two_machines_as_the_readme_has_it() {
    need_root();
    need(TOOLS);
    let _alone = one_at_a_time();
    let folder = scratch();
    let (mut alpha, mut beta) = (Machine::new("alpha", folder.path()), Machine::new("beta", folder.path()));
    connect(&alpha, &beta);
    let said = &mut String::new();

    // Pair.
    let receiver =
        format!("[node]\nname = \"beta\"\nstate_dir = \"state\"\n\n[receiver]\nlisten = \"{BETA}:7447\"\nstore = \"store\"\n");
    beta.edits(said, "twinsite.toml", &receiver);
    let beta_key = pasted(&beta.types(said, "twinsite id"));
    let group = format!(
        "[node]\nname = \"alpha\"\nstate_dir = \"state\"\n\n[[group]]\nname = \"db\"\npeer = \"{BETA}:7447\"\n\
         peer_key = \"{beta_key}\"\n\n[[group.disk]]\nname = \"root\"\npath = \"root.raw\"\nexport = \"unix:root.sock\"\n"
    );
    alpha.edits(said, "twinsite.toml", &group);
    let alpha_key = pasted(&alpha.types(said, "twinsite id"));
    let client = format!("{receiver}\n[[receiver.client]]\nname = \"alpha\"\nkey = \"{alpha_key}\"\n");
    beta.edits(said, "twinsite.toml", &client);
    beta.types(said, "twinsite run > twinsite.log 2>&1 &");

    // Protect a disk that has data on it already.
    alpha.types(said, "mkdir letters && echo 'written before it was protected' > letters/old.txt");
    alpha.types(said, "truncate -s 256M root.raw && mkfs.ext4 -q -d letters root.raw");
    alpha.types(said, "twinsite run > twinsite.log 2>&1 &");
    let streaming = |machine: &Machine| {
        let output = machine.command("twinsite status --json db").output().expect("nsenter");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let group = &status["primary"][0];
        (group["state"] == "streaming" && group["dirty_bytes"] == 0 && !group["committed"].is_null()).then_some(())
    };
    eventually("the first sync is complete", Duration::from_secs(60), || streaming(&alpha));

    // The guest: a file system on the exported disk.
    alpha.mounts = vec!["root.img", "mnt"];
    alpha.types(said, "touch root.img && mkdir mnt");
    alpha.types(said, "nbdfuse root.img 'nbd+unix:///root?socket=root.sock' > nbdfuse.log 2>&1 &");
    let mounted = |machine: &Machine, file: &str| {
        let size = std::fs::metadata(machine.folder.join(file)).map_or(0, |m| m.len());
        (size == 256 << 20).then_some(())
    };
    eventually("the disk is there", Duration::from_secs(20), || mounted(&alpha, "root.img"));
    alpha.types(said, "mount -o loop root.img mnt");
    alpha.types(said, "cat mnt/old.txt");
    alpha.types(said, "echo 'written while it was protected' > mnt/new.txt && sync -f mnt");
    eventually("the new file is committed", Duration::from_secs(60), || streaming(&alpha));

    // Watch.
    let watched = alpha.command("timeout 3 twinsite status --watch; test $? = 124").output().expect("nsenter");
    let pictures = support::text(&watched);
    assert!(watched.status.success() && pictures.matches("group db").count() >= 2, "{pictures}");
    let shown = alpha.types(said, "twinsite status");
    assert!(shown.contains("streaming"), "{said}");
    beta.types(said, "twinsite status");

    // The disaster: everything on the first machine is gone, and so is its network.
    let _ = writeln!(said, "\n*** everything in alpha's namespace is killed; its cable is pulled ***\n");
    alpha.dies();
    run("ip", &["netns", "del", &alpha.namespace]);
    let lost = eventually("the receiver notices", Duration::from_secs(60), || {
        let output = beta.command("twinsite status --json db").output().expect("nsenter");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        (status["receiver"]["groups"][0]["state"] == "waiting").then_some(status)
    });
    assert!(!lost["receiver"]["groups"][0]["committed"].is_null(), "{lost:#}");

    // Run from the copy.
    beta.types(said, "twinsite points db --all");
    beta.types(said, "twinsite failover db --export unix:db.sock --yes");
    beta.mounts = vec!["root.img", "mnt"];
    beta.types(said, "touch root.img && mkdir mnt");
    beta.types(said, "nbdfuse root.img 'nbd+unix:///root?socket=db.sock' > nbdfuse.log 2>&1 &");
    eventually("the copy is there", Duration::from_secs(20), || mounted(&beta, "root.img"));
    beta.types(said, "mount -o loop root.img mnt");
    let read = beta.types(said, "cat mnt/old.txt mnt/new.txt");
    assert_eq!(read, "written before it was protected\nwritten while it was protected\n", "{said}");
    beta.types(said, "echo 'written at the second site' > mnt/on.txt && sync -f mnt && ls mnt");
    beta.types(said, "umount mnt && e2fsck -fn root.img");
    beta.types(said, "twinsite status");

    // The first machine comes back as it was: it learns that it may not write, and takes its disk back.
    let _ = writeln!(said, "\n*** alpha is repaired: its cable is plugged in, its node is started ***\n");
    for mount in alpha.mounts.drain(..).rev() {
        run("umount", &["--lazy", alpha.folder.join(mount).to_str().expect("a path")]);
    }
    run("ip", &["netns", "add", &alpha.namespace]);
    connect(&alpha, &beta);
    alpha.types(said, "twinsite run > twinsite.log 2>&1 &");
    eventually("it learns that it is fenced", Duration::from_secs(60), || {
        let output = alpha.command("twinsite status --json db").output().expect("nsenter");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        (status["primary"][0]["state"] == "fenced").then_some(())
    });
    alpha.types(said, "twinsite status db | head -n 8");
    // The guest at the second site is shut down by now; what it wrote comes home.
    for mount in beta.mounts.drain(..).rev() {
        let _ = Command::new("umount").args(["--lazy", beta.folder.join(mount).to_str().expect("a path")]).status();
    }
    alpha.types(said, "twinsite failback db --yes");
    eventually("it is the primary again", Duration::from_secs(60), || streaming(&alpha));
    alpha.mounts = vec!["root.img", "mnt"];
    alpha.types(said, "nbdfuse root.img 'nbd+unix:///root?socket=root.sock' > nbdfuse.log 2>&1 &");
    eventually("the disk is there again", Duration::from_secs(20), || mounted(&alpha, "root.img"));
    alpha.types(said, "mount -o loop root.img mnt");
    let home = alpha.types(said, "cat mnt/on.txt && ls mnt");
    assert_eq!(home, "written at the second site\nlost+found\nnew.txt\nold.txt\non.txt\n", "{said}");
    alpha.types(said, "twinsite status db | head -n 6");
    println!("{said}");
}
