//! `twinsite export`: a disk of a point as a file.
//!
//! Always holds: under the file's name there is a whole image or what was there before. The image is written under another name beside it, synced, and
//! renamed. The node serves the point read-only at a private socket, held as a drill with a script is; this process reads and writes.

mod image;
mod qcow2;

use std::fs::{File, Permissions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use clap::{Args, ValueEnum};
use proto::{Name, Point};
use serde::Serialize;

use self::image::{Image, Raw};
use self::qcow2::Qcow2;
use super::human::{self, bytes};
use super::{Control, Usage, client, drill, interrupt};
use crate::api::{DrillEnd, DrillEnded, DrillRequest, DrillStarted};
use crate::nbd::{PIECE_BYTES, Piece, Source};

const BAR_WIDTH: usize = 30;
/// From one picture of the progress to the next.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// `twinsite export`.
#[derive(Args)]
pub(crate) struct ExportArgs {
    /// GROUP, or CLIENT/GROUP
    group: String,
    /// This point, not the newest: GENERATION.EPOCH, or a name of one
    #[arg(long, value_name = "POINT", value_parser = super::point)]
    point: Option<String>,
    /// This kept fork, whole (see twinsite forks)
    #[arg(long, conflicts_with = "point")]
    fork: Option<Name>,
    /// The disk, if the group has several
    #[arg(long)]
    disk: Option<Name>,
    /// The file
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Its format
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Replace a file that is there
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: Control,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Format {
    /// A plain sparse image
    Raw,
    /// A qcow2 image, version 3
    Qcow2,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Exported<'a> {
    client: &'a Name,
    group: &'a Name,
    point: Point,
    fork: Option<&'a Name>,
    cut_unix_us: u64,
    disk: &'a Name,
    file: &'a Path,
    format: Format,
    size_bytes: u64,
    /// Bytes of the disk that were read, the rest being holes.
    data_bytes: u64,
    took_ms: u64,
}

impl ExportArgs {
    pub(crate) fn control(&self) -> &Control {
        &self.at
    }
}

pub(crate) fn run(socket: &Path, args: ExportArgs) -> anyhow::Result<()> {
    let file = std::path::absolute(&args.to).with_context(|| format!("{}: no usable path", args.to.display()))?;
    if !args.force && file.symlink_metadata().is_ok() {
        return Err(Usage(format!("{}: exists: choose another --to, or add --force to replace it", file.display())).into());
    }
    let request = DrillRequest {
        group: args.group.clone(),
        point: args.point.clone(),
        fork: args.fork.clone(),
        name: None,
        export: None,
        space_max_bytes: None,
        script: None,
        ignore_hooks: false,
        read_only: true,
    };
    let point: DrillStarted = client::wait_for(socket, "/v1/drill", &request, "reading the journal up to that point")?;
    let gone = Arc::new(AtomicBool::new(false));
    drill::hold(socket, &point, &gone)?;
    interrupt::cancels(&gone)?;
    let written = write(&point, &args, &file, &gone);
    let end = DrillEnd { name: point.name.clone(), serial: Some(point.serial), report: None };
    let ended = client::post::<DrillEnded>(socket, "/v1/drill/end", &end);
    let told = written?;
    // The file is whole; that the node could not put its own things in order is no failure of it.
    if let Err(error) = ended {
        eprintln!("{}: {error}", point.name);
    }
    writeln!(std::io::stdout(), "{told}")?;
    Ok(())
}

/// Writes the file; returns what is to be said.
fn write(point: &DrillStarted, args: &ExportArgs, file: &Path, gone: &AtomicBool) -> anyhow::Result<String> {
    let began = Instant::now();
    let disk = chosen(point, args)?;
    let Some(socket) = point.export.strip_prefix("unix:") else {
        bail!("{}: not the private socket that was asked for", point.export)
    };
    let mut source = Source::connect(Path::new(socket), disk.as_str())
        .with_context(|| format!("disk {disk}: cannot read it from the node"))?;
    let folder = file.parent().unwrap_or(Path::new("/"));
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let aside = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".partial")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(folder)
        .with_context(|| format!("{}: cannot write there", folder.display()))?;
    let out = aside.as_file().try_clone().with_context(|| format!("{}: cannot write there", aside.path().display()))?;
    let size_bytes = source.size();
    let data_bytes = match args.format {
        Format::Raw => copy(&mut source, Raw::new(out, size_bytes)?, disk, args.json, gone),
        Format::Qcow2 => copy(&mut source, Qcow2::new(out, size_bytes)?, disk, args.json, gone),
    };
    let data_bytes = data_bytes.with_context(|| format!("{}: not written", file.display()))?;
    aside.as_file().sync_all().with_context(|| format!("{}: cannot be synced", file.display()))?;
    let kept = if args.force { aside.persist(file) } else { aside.persist_noclobber(file) };
    kept.map_err(|e| e.error).with_context(|| format!("{}: cannot be given its name", file.display()))?;
    File::open(folder).and_then(|folder| folder.sync_all()).with_context(|| format!("{}: cannot be synced", folder.display()))?;
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (client, group, cut_unix_us) = (&point.client, &point.group, point.cut_unix_us);
    let done = Exported {
        client,
        group,
        point: point.point,
        fork: point.fork.as_ref(),
        cut_unix_us,
        disk,
        file,
        format: args.format,
        size_bytes,
        data_bytes,
        took_ms,
    };
    if args.json {
        return Ok(serde_json::to_string_pretty(&done)?);
    }
    let rate = bytes((data_bytes as f64 / began.elapsed().as_secs_f64().max(0.001)) as u64);
    Ok(format!(
        "{}: disk {disk} of group {client}/{group} at {}, {}, of which {} are data; {} after {}, {rate}/s",
        file.display(),
        drill::what(point.point, point.fork.as_ref()),
        bytes(size_bytes),
        bytes(data_bytes),
        if args.format == Format::Raw { "raw" } else { "qcow2" },
        human::ms(took_ms)
    ))
}

fn chosen<'a>(point: &'a DrillStarted, args: &ExportArgs) -> anyhow::Result<&'a Name> {
    let names: Vec<&Name> = point.volumes.iter().map(|v| &v.name).collect();
    let known = || names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match (&args.disk, names.as_slice()) {
        (None, [one]) => Ok(one),
        (None, _) => Err(Usage(format!("group {} has several disks: choose one with --disk: {}", args.group, known())).into()),
        (Some(wanted), all) => match all.iter().find(|name| **name == wanted) {
            Some(found) => Ok(found),
            None => Err(Usage(format!("group {} has no disk '{wanted}': it has {}", args.group, known())).into()),
        },
    }
}

/// Copies what is no hole, in order. Returns the bytes that were read.
fn copy(source: &mut Source, mut image: impl Image, disk: &Name, json: bool, gone: &AtomicBool) -> anyhow::Result<u64> {
    let size = source.size();
    let mut meter = Meter::new(json, size);
    let mut data_bytes = 0;
    loop {
        if gone.load(Ordering::Relaxed) {
            meter.end();
            bail!("interrupted, or the node is gone: run it again");
        }
        let at = source.at();
        let piece = source.next().inspect_err(|_| meter.end());
        match piece.map_err(|error| unread(&error, disk, at))? {
            None => break,
            Some(Piece { offset, content }) => {
                image.write(offset, &content).inspect_err(|_| meter.end())?;
                data_bytes += content.len() as u64;
                meter.draw(offset, data_bytes);
            }
        }
    }
    meter.end();
    image.finish()?;
    Ok(data_bytes)
}

/// Whether the disk or the node is meant.
fn unread(error: &std::io::Error, disk: &Name, at: u64) -> anyhow::Error {
    use std::io::ErrorKind as K;
    match error.kind() {
        K::UnexpectedEof | K::BrokenPipe | K::ConnectionReset => anyhow!("the node is gone: run it again"),
        _ => anyhow!("disk {disk}: the {PIECE_BYTES} bytes at offset {at} cannot be read ({error}): the node's log says why"),
    }
}

/// One line on standard error that changes.
struct Meter {
    began: Instant,
    drawn: Option<Instant>,
    shown: bool,
    size: u64,
}

impl Meter {
    fn new(json: bool, size: u64) -> Self {
        Self { began: Instant::now(), drawn: None, shown: std::io::stderr().is_terminal() && !json, size }
    }

    fn draw(&mut self, done: u64, data_bytes: u64) {
        if !self.shown || self.drawn.is_some_and(|drawn| drawn.elapsed() < SHOW_EVERY) {
            return;
        }
        self.drawn = Some(Instant::now());
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        // Of the way through the disk, holes and all.
        let pace = (done as f64 / seconds) as u64;
        let left = (self.size - done.min(self.size)).checked_div(pace).map_or_else(|| "-".to_owned(), |s| human::ms(s * 1000));
        let rate = (data_bytes as f64 / seconds) as u64;
        let drawn = human::bar(done, self.size, BAR_WIDTH);
        eprint!("\r\x1b[2K{drawn} {} of {}  {}/s  {left} left", bytes(done), bytes(self.size), bytes(rate));
        // Nothing depends on its being seen.
        let _ = std::io::stderr().flush();
    }

    fn end(&mut self) {
        if self.drawn.take().is_some() {
            eprint!("\r\x1b[2K");
        }
    }
}
