//! The command line: what can be said, and which module answers. Exit codes: 0 done, 1 failed, 2 the command line or the
//! configuration is wrong, so that trying again unchanged cannot help, 3 refused because it would be dangerous as things are.

mod adopt;
mod check;
pub(crate) mod client;
mod config_check;
pub(crate) mod drill;
mod export;
pub(crate) mod failover;
mod forks;
mod handback;
mod hooks;
pub(crate) mod human;
mod id;
pub(crate) mod interrupt;
mod points;
mod status;
mod verify;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use proto::Name;

use crate::config::{CONFIG_DEFAULT, Config, ConfigErrors, STATE_DIR_DEFAULT, units};
use crate::{demo, node, script};

/// The command line was wrong.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(pub(crate) String);

/// Keeps a live, consistent copy of a server's disks at a second site and turns it into the running server.
#[derive(Parser)]
#[command(
    name = "twinsite",
    version,
    after_help = "\
Examples:
  twinsite demo               both sites on this machine, and a disaster
  twinsite id                 this machine's key, for the other machine
  twinsite run --config /etc/twinsite/twinsite.toml
  twinsite status --watch
  twinsite verify db
  twinsite drill db --run ./boots.sh
  twinsite failover db --export unix:/run/twinsite/db.sock

The other site is lost? On the machine that keeps the copy:
  twinsite status                        which groups it has, and how old they are
  twinsite failover db --preview         what would happen, and what is lost
  twinsite failover --help               how to go on

Every command has examples of its own in its --help.
Exit codes: 0 done; 1 failed; 2 the command line or the configuration is wrong;
3 refused, because it would be dangerous as things are: the line says why."
)]
struct Cli {
    /// The configuration file
    #[arg(long, global = true, value_name = "FILE", env = "TWINSITE_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run this node: every role that the configuration names
    #[command(after_help = "\
Examples:
  twinsite run --config twinsite.toml
  twinsite run --check --config twinsite.toml     change nothing

SIGTERM and SIGINT stop in order: guests are disconnected, the last epoch is
committed; a second signal stops at once. Logs go to standard error; RUST_LOG
overrides the level of the file.")]
    Run {
        /// Only check the configuration
        #[arg(long)]
        check: bool,
        /// End with the process that started this one
        #[arg(long, hide = true)]
        with_parent: bool,
    },
    /// Print this node's name and key, and what to paste at the other machine
    #[command(after_help = "\
Examples:
  twinsite id
  twinsite id --json

The key is made at first use, in the state folder. No running node is needed.")]
    Id {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how replication fares
    #[command(after_help = "\
Examples:
  twinsite status
  twinsite status --watch         again every second, until Ctrl-C
  twinsite status --json db       for scripts: field names are an interface

At a primary, lag is the age of the oldest acknowledged write that is not
committed at the receiver: so much would be lost now. At a receiver, committed
is the newest point and how long ago it was cut.")]
    Status {
        /// Only this group
        group: Option<String>,
        /// Show it again every second
        #[arg(long)]
        watch: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// List the points of a group that can be activated (at the receiver)
    #[command(after_help = "\
Examples:
  twinsite points db
  twinsite points alpha/db --all      if two clients send a group of this name
  twinsite points db --json
  twinsite points db --timeline       what is kept, by age
  twinsite points db --name 1.18211 before-upgrade
  twinsite points db --unname before-upgrade

The newest point has what was written last, also what you may want to be rid
of: to run from an earlier one, twinsite failover db --point POINT.

Older points are given up, and more and more of those between are left out, as
`retention` in the receiver's configuration says. CHANGED and STORED count from
the point before it in the list. A point with a name stays until the name is
taken away; failover, drill, export and rollback take the name wherever they
take a point.")]
    Points {
        /// GROUP, or CLIENT/GROUP
        group: String,
        /// All points, not only the newest
        #[arg(long)]
        all: bool,
        /// How many points there are of each age, and what they take
        #[arg(long, conflicts_with_all = ["all", "name", "unname"])]
        timeline: bool,
        /// Give a point a name
        #[arg(long, num_args = 2, value_names = ["POINT", "NAME"], conflicts_with_all = ["all", "unname"])]
        name: Option<Vec<String>>,
        /// Take a name away
        #[arg(long, value_name = "NAME", conflicts_with = "all")]
        unname: Option<String>,
        /// Print JSON (always all points)
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Turn the copy of a group into the running server (at the receiver)
    #[command(group = clap::ArgGroup::new("unasked").args(["preview", "yes"]).multiple(true), after_help = "\
Examples:
  twinsite failover db --preview                 only say what would happen
  twinsite failover db --export unix:/run/twinsite/db.sock
  twinsite points db                             look for an earlier point, then
  twinsite failover db --export unix:/run/twinsite/db.sock --point 1.18211
  twinsite failover db --export unix:/run/twinsite/db.sock --point before-upgrade
  twinsite failover db --export tcp:127.0.0.1:10809 --yes --json
                                                 for scripts

When the other site is lost, on the machine that keeps the copy:
  1. Make sure that the lost server does not run any more, nor comes back by
     itself: two running servers would each have changes that the other lacks.
  2. Run failover. It says what it will do, what is lost, and asks.
  3. Start the server from the NBD addresses that it prints, for example
     qemu-system-x86_64 … -drive file=ADDRESS,format=raw,if=virtio

It raises the group's generation, so the old primary can no longer replicate
into it; makes a writable fork of the point; and serves its disks over NBD.
Nothing is copied, so it takes as long for any size of disk. All points are
kept. Running it again for an active group serves it at the new address.

It is refused, with exit code 3, while the primary is alive: something was
heard from it in the last 5 s and it was not stopped in order. --force does it
nevertheless; --yes does not. A hook before it that fails stops it, unless
--ignore-hooks is given.")]
    Failover {
        /// GROUP, or CLIENT/GROUP
        group: String,
        /// Activate this point, not the newest: GENERATION.EPOCH, or a name of one
        #[arg(long, value_name = "POINT", value_parser = point)]
        point: Option<String>,
        /// Where the disks are served: unix:PATH or tcp:IP:PORT
        #[arg(long, value_name = "ADDRESS", required_unless_present = "preview")]
        export: Option<String>,
        /// Only say what it would do
        #[arg(long)]
        preview: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Also if the primary is alive: two servers may run then
        #[arg(long)]
        force: bool,
        /// Go on if the hook before it fails
        #[arg(long)]
        ignore_hooks: bool,
        /// Print JSON (needs --yes or --preview)
        #[arg(long, requires = "unasked")]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Show what the hooks did: the newest runs, with their output
    #[command(after_help = "\
Examples:
  twinsite hooks
  twinsite hooks --json

Hooks are programs of yours that are run before and after a transition; they
are named in [hooks] of the configuration. The newest 32 runs are kept, of the
output of each the last 64 KiB.")]
    Hooks {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Make the other site the server, with nothing lost (at the receiver, with the primary connected)
    #[command(after_help = "\
Examples:
  twinsite switchover db --export unix:/run/twinsite/db.sock
  twinsite switchover db --export tcp:127.0.0.1:10809 --within 5m --yes

The primary takes no more writes and commits what it has; then the copy is
activated from that point. If the primary is not done in time it takes writes
again, and nothing was changed. The way home is `twinsite failback` there.")]
    Switchover {
        /// GROUP, or CLIENT/GROUP
        group: String,
        /// Where the disks are served: unix:PATH or tcp:IP:PORT
        #[arg(long, value_name = "ADDRESS")]
        export: String,
        /// How long the primary may take to commit what it has
        #[arg(long, default_value = "1m", value_parser = units::duration_argument)]
        within: Duration,
        /// Go on if the hook before it fails
        #[arg(long)]
        ignore_hooks: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Print JSON (needs --yes)
        #[arg(long, requires = "yes")]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Take the disks back after a failover or a switchover (at the old primary)
    #[command(after_help = "\
Examples:
  twinsite failback db
  twinsite failback db --yes --json     for scripts: waits for the end

First says what it will do and how much it will move. What was written here
after the sites had parted is kept at the receiver as a fork; then only blocks
that changed on either side are sent, while the active copy goes on; at the
end it is held up for a moment and this node is the primary again. When it
breaks, the active copy goes on, and the command can be repeated.")]
    Failback {
        /// The group
        group: String,
        /// Go on if the hook before it fails
        #[arg(long)]
        ignore_hooks: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Print JSON (needs --yes)
        #[arg(long, requires = "yes")]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Put the disks back to an earlier point (at the primary)
    #[command(after_help = "\
Examples:
  twinsite rollback db --point 1.18211
  twinsite rollback db --point before-upgrade
  twinsite rollback db --point 1.18211 --yes --json

Points and their names are listed by `twinsite points` at the receiver. Stop the machine that
uses the disks. What they hold now is committed first and stays a point, so a
rollback can be rolled back. Only blocks that differ are moved.")]
    Rollback {
        /// The group
        group: String,
        /// The point: GENERATION.EPOCH, or the name that it has at the receiver
        #[arg(long, value_name = "POINT", value_parser = point)]
        point: String,
        /// Go on if the hook before it fails
        #[arg(long)]
        ignore_hooks: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Print JSON (needs --yes)
        #[arg(long, requires = "yes")]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Try a point out: a writable copy of it that is thrown away, while replication goes on (at the receiver)
    #[command(after_help = "\
Examples:
  twinsite drill db --export unix:/run/twinsite/drill.sock
  twinsite drill db --point 1.18211 --name monday --export tcp:127.0.0.1:10810
  twinsite drill list
  twinsite drill end drill-1
  twinsite drill db --run ./boots.sh --timeout 5min
  twinsite drill db --fork diverged-1 --export unix:/run/twinsite/old.sock
  twinsite drill results db

Makes a writable fork of the point and serves its disks over NBD. Nothing is
copied, nothing of the group is changed: replication, the points and a failover
go on beside it. Several at once, each with its name. What was written to one is
gone when it ends, and when the node stops. Writes beyond --space fail with
'no space left', in the drill only.

--run makes the fork at a private socket, runs the script as you, with the
disks in TWINSITE_EXPORT (the first), TWINSITE_EXPORT_<disk>, TWINSITE_DISKS,
TWINSITE_POINT and others, and throws the fork away. Exit code 0 of the script
means that the point is verified; the last line that it prints is the remark.
Exit code 0 if it passed, 1 if not.

--fork tries what an old primary had written of its own (twinsite forks). The
kept fork itself is never changed. A hook before the drill that fails stops it,
unless --ignore-hooks is given.")]
    Drill(drill::DrillArgs),
    /// Make images that were carried over by hand the copy of a new group (at the receiver)
    #[command(after_help = "\
Examples:
  twinsite adopt alpha/db --disk root --from /mnt/usb/root.raw
  twinsite adopt db --disk root --from root.raw --disk data --from data.raw
  twinsite adopt db --watch        show the one that runs

Before the primary connects for the first time: shut the guest down or take a
snapshot, copy its disks raw, carry them here, adopt them, start the primary.
It compares all blocks by hash and sends only those that differ. The images
are copied and stay as they are. Nothing can be activated before the primary
has committed its first epoch. Ctrl-C ends the watching only.")]
    Adopt(adopt::AdoptArgs),
    /// Write a disk of a point to a file, raw or qcow2 (at the receiver)
    #[command(after_help = "\
Examples:
  twinsite export db --to db.raw
  twinsite export db --point 1.18211 --disk data --to data.qcow2 --format qcow2
  twinsite export db --point before-upgrade --to db.raw
  twinsite export db --fork diverged-1 --to old.raw

The newest point by default. --fork writes the whole disk as an old primary had
it: see twinsite forks. The file is sparse, is written under another name
beside the one it gets, and gets that when it is whole and on the disk.
Replication goes on meanwhile.")]
    Export(export::ExportArgs),
    /// List or remove what old primaries had written of their own (at the receiver)
    #[command(after_help = "\
Examples:
  twinsite forks
  twinsite forks db --json
  twinsite export db --fork diverged-1 --to old.raw
  twinsite drill db --fork diverged-1 --export unix:/run/twinsite/old.sock
  twinsite forks db --remove diverged-1

When the sites part and both are written, failback keeps what the old primary
had written of its own as a fork, diverged-GENERATION, before its disks are
overwritten. It is whole: its own blocks over the newest point that both sites
knew, which stays as long as the fork. It counts for the client's space_max,
and stays until you remove it. Removing it cannot be undone.")]
    Forks {
        /// GROUP, or CLIENT/GROUP
        group: Option<String>,
        /// Remove this fork for good
        #[arg(long, value_name = "NAME")]
        remove: Option<Name>,
        /// Do not ask
        #[arg(long, requires = "remove")]
        yes: bool,
        /// Print JSON (with --remove, needs --yes)
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Compare the disks of a group with its copy, now and whole (at the primary)
    #[command(after_help = "\
Examples:
  twinsite verify db
  twinsite verify db --json       waits for the end, then prints it

Reads every block of the disks at full speed while the guest goes on, and
has the receiver compare it with its newest point. What differs is sent again.
Asked again while it runs, it shows the one that runs; Ctrl-C leaves it running.
Exit code 0 if nothing differed, 1 if something did or could not be read.")]
    Verify {
        /// The group
        group: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Verify every frame and seal of a store (its node must be stopped)
    #[command(after_help = "\
Examples:
  twinsite check /srv/twinsite
  twinsite check --json /srv/twinsite

Reads only; repairs nothing. Exit code 1 if anything is damaged.")]
    Check {
        /// The store's folder
        store: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show a failover on this machine: two nodes, a disk under load, the primary killed, the copy verified
    #[command(after_help = "\
Examples:
  twinsite demo
  twinsite demo --disk image.raw --seconds 60     works on a copy of the image
  twinsite demo --interval 100ms --json

Needs no root and no other programs. Exit code 1 if anything does not verify.")]
    Demo(DemoArgs),
    /// Print a completion script
    #[command(after_help = "\
Examples:
  twinsite completion bash > /etc/bash_completion.d/twinsite
  twinsite completion zsh > ~/.zfunc/_twinsite")]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Options of the demo.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoArgs {
    /// A raw disk image; the demo works on a copy (default: an empty disk of 256 MiB)
    #[arg(long, value_name = "IMAGE")]
    pub(crate) disk: Option<PathBuf>,
    /// Seconds of load before the disaster
    #[arg(long, default_value_t = 15, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) seconds: u64,
    /// Epoch interval
    #[arg(long, default_value = "1s", value_parser = units::interval_argument)]
    pub(crate) interval: Duration,
    /// Writes a second, all writers together
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) writes_per_second: u32,
    /// Folder for the temporary files (default: the system's)
    #[arg(long, value_name = "FOLDER")]
    pub(crate) dir: Option<PathBuf>,
    /// Keep the temporary files
    #[arg(long)]
    pub(crate) keep: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the running node is.
#[derive(Args, Clone)]
pub(crate) struct Control {
    /// The node's control socket, if the configuration is not at hand
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// A point or the name of one, which the node knows or not; what can be neither is a usage error.
fn point(text: &str) -> Result<String, String> {
    let either = text.parse::<proto::Point>().is_ok() || text.parse::<Name>().is_ok();
    either
        .then(|| text.to_owned())
        .ok_or_else(|| "a point is GENERATION.EPOCH, for example 3.18211, or the name of one".to_owned())
}

/// Runs the command line.
pub(crate) fn main() -> ExitCode {
    // No command of a user's: neither help nor completion know it.
    let guards = std::env::args_os().nth(1).is_some_and(|first| first == script::GUARD);
    let done = match guards {
        true => script::guard(&script::GuardArgs::parse_from(std::env::args_os().skip(1))),
        false => dispatch(Cli::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let told = with_causes(&error);
            // Of our own errors only those of a configuration have several lines; what a peer sent has one.
            let lines: Vec<&str> = if error.is::<ConfigErrors>() { told.lines().collect() } else { vec![&told] };
            lines.into_iter().for_each(|line| eprintln!("{}", human::sanitised(line)));
            let usage = error.is::<Usage>() || error.is::<ConfigErrors>();
            let refused = error.is::<client::Refusal>();
            ExitCode::from(if usage {
                2
            } else if refused {
                3
            } else {
                1
            })
        }
    }
}

/// An error and what caused it, each said once: most of ours name their cause themselves.
fn with_causes(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        _ if told.contains(&cause) => told,
        _ => format!("{told}: {cause}"),
    })
}

/// The reader of our output went away (`| head`): no failure of ours.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe))
}

fn dispatch(cli: Cli) -> anyhow::Result<()> {
    let file = cli.config;
    let socket = |at: &Control| control_socket(file.as_deref(), at);
    match cli.command {
        Command::Run { check, with_parent } => run(file.as_deref(), check, with_parent),
        Command::Id { json } => id::run(file.as_deref(), json),
        Command::Status { group, watch, json, at } => status::run(&socket(&at)?, group.as_deref(), watch, json),
        Command::Points { group, all, timeline, name, unname, json, at } => {
            let socket = socket(&at)?;
            match (name.as_deref(), unname) {
                (Some([point, name]), _) => points::name(&socket, &group, name, Some(point), json),
                (_, Some(name)) => points::name(&socket, &group, &name, None, json),
                _ if timeline && !json => points::timeline(&socket, &group),
                _ => points::run(&socket, &group, all, json),
            }
        }
        Command::Failover { group, point, export, preview, yes, force, ignore_hooks, json, at } => {
            let wish = failover::Wish { group, point, export, preview, yes, force, ignore_hooks, json };
            failover::run(&socket(&at)?, &wish)
        }
        Command::Switchover { group, export, within, ignore_hooks, yes, json, at } => {
            handback::switchover(&socket(&at)?, &handback::Switchover { group, export, within, ignore_hooks, yes, json })
        }
        Command::Failback { group, ignore_hooks, yes, json, at } => {
            handback::run(&socket(&at)?, &handback::Wish { group, point: None, ignore_hooks, yes, json })
        }
        Command::Rollback { group, point, ignore_hooks, yes, json, at } => {
            handback::run(&socket(&at)?, &handback::Wish { group, point: Some(point), ignore_hooks, yes, json })
        }
        Command::Drill(args) => {
            let socket = socket(args.control())?;
            drill::run(&socket, args)
        }
        Command::Adopt(args) => {
            let socket = socket(args.control())?;
            adopt::run(&socket, args)
        }
        Command::Export(args) => {
            let socket = socket(args.control())?;
            export::run(&socket, args)
        }
        Command::Forks { group, remove, yes, json, at } => {
            let socket = socket(&at)?;
            match remove {
                Some(fork) => forks::remove(&socket, group.as_deref(), &fork, yes, json),
                None => forks::list(&socket, group.as_deref(), json),
            }
        }
        Command::Hooks { json, at } => hooks::run(&socket(&at)?, json),
        Command::Verify { group, json, at } => verify::run(&socket(&at)?, &group, json),
        Command::Check { store, json } => check::run(&store, json),
        Command::Demo(args) => demo::run(&args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "twinsite", &mut script);
            Ok(std::io::Write::write_all(&mut std::io::stdout(), &script)?)
        }
    }
}

fn run(file: Option<&Path>, check: bool, with_parent: bool) -> anyhow::Result<()> {
    let file = file.unwrap_or(Path::new(CONFIG_DEFAULT));
    let config = Config::load_to_run(file)?;
    if check {
        // What is not there yet may come to be until the node runs.
        config_check::warnings(&config).iter().for_each(|line| eprintln!("WARNING: {}", human::sanitised(line)));
        let disks: usize = config.groups.iter().map(|g| g.disks.len()).sum();
        let receiver = match &config.receiver {
            Some(receiver) => format!("receiver on {} with {}", receiver.listen, human::count(receiver.clients.len(), "client")),
            None => "no receiver".to_owned(),
        };
        let (groups, disks) = (human::count(config.groups.len(), "group"), human::count(disks, "disk"));
        println!("{}: valid: {groups}, {disks}, {receiver}", file.display());
        return Ok(());
    }
    if with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    }
    start_log(config.node.log);
    node::run(config)
}

fn start_log(level: &str) {
    use tracing_subscriber::EnvFilter;
    let ours = format!("warn,twinsite={level},proto={level},blockdev={level},replicator={level},receiver={level}");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(ours));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// The control socket: as given, else as configured, else where it is by default.
fn control_socket(file: Option<&Path>, at: &Control) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &at.socket {
        return Ok(socket.clone());
    }
    match file {
        Some(file) => Ok(Config::load(file)?.node.control),
        None if Path::new(CONFIG_DEFAULT).exists() => Ok(Config::load(Path::new(CONFIG_DEFAULT))?.node.control),
        None => Ok(Path::new(STATE_DIR_DEFAULT).join("control.sock")),
    }
}
