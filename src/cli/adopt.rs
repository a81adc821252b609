//! `twinsite adopt`: has the node make images that were carried over the base of a new group, and shows how far it is.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use proto::Name;

use super::human::{self, bytes, ms};
use super::{Control, Usage, client};
use crate::api::{AdoptDisk, AdoptRequest, AdoptStatus};

const BAR_WIDTH: usize = 30;
/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// `twinsite adopt`.
#[derive(Args)]
pub(crate) struct AdoptArgs {
    /// CLIENT/GROUP, or GROUP if there is one client
    group: String,
    /// A disk of the group, in the order of the primary's configuration; its image is the --from that follows
    #[arg(long, required_unless_present = "watch", conflicts_with = "watch")]
    disk: Vec<Name>,
    /// The raw image or block device of the disk before
    #[arg(long, value_name = "FILE", required_unless_present = "watch", conflicts_with = "watch")]
    from: Vec<PathBuf>,
    /// Begin nothing; show the one that runs
    #[arg(long)]
    watch: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: Control,
}

impl AdoptArgs {
    pub(crate) fn control(&self) -> &Control {
        &self.at
    }
}

pub(crate) fn run(socket: &Path, args: AdoptArgs) -> anyhow::Result<()> {
    if args.disk.len() != args.from.len() {
        return Err(Usage("give each --disk its --from".to_owned()).into());
    }
    let look = format!("/v1/adopt?group={}", client::encoded(&args.group));
    let mut now: AdoptStatus = if args.watch {
        client::get(socket, &look)?
    } else {
        // Relative to where the user stands, not to the daemon's folder.
        let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let disks = args.disk.into_iter().zip(args.from).map(|(disk, from)| AdoptDisk { disk, from: here.join(from) });
        client::post(socket, "/v1/adopt", &AdoptRequest { group: args.group, disks: disks.collect() })?
    };
    let shown = std::io::stderr().is_terminal() && !args.json;
    let look = format!("/v1/adopt?group={}", client::encoded(&format!("{}/{}", now.client, now.group)));
    while now.running {
        if shown {
            draw(&now);
        }
        std::thread::sleep(LOOK_EVERY);
        now = client::get(socket, &look)?;
    }
    if shown {
        eprint!("\r\x1b[2K");
    }
    if args.json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&now)?)?;
    }
    let name = format!("{}/{}", now.client, now.group);
    if let Some(error) = now.error {
        bail!("group {name}: {error}");
    }
    if !args.json {
        let (size, took) = (bytes(now.total_bytes), ms(now.elapsed_ms));
        writeln!(std::io::stdout(), "group {name}: {size} adopted after {took}.")?;
        writeln!(
            std::io::stdout(),
            "Nothing of it can be activated yet: start its primary, which compares and sends what differs."
        )?;
    }
    Ok(())
}

fn draw(now: &AdoptStatus) {
    let rate = (now.done_bytes as f64 * 1000.0 / (now.elapsed_ms.max(1) as f64)) as u64;
    let left = now.total_bytes.saturating_sub(now.done_bytes).checked_div(rate).map_or_else(|| "-".to_owned(), |s| ms(s * 1000));
    let drawn = human::bar(now.done_bytes, now.total_bytes.max(1), BAR_WIDTH);
    eprint!("\r\x1b[2K{drawn} {} of {}  {}/s  {left} left", bytes(now.done_bytes), bytes(now.total_bytes), bytes(rate));
    // Nothing depends on its being seen.
    let _ = std::io::stderr().flush();
}
