//! From sections and keys to a [`Config`]: which keys there are, their defaults and limits, and what must be unique.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockdev::nbd::ListenAddr;
use proto::units::GROUP_VOLUMES_MAX;
use proto::{Codec, Name};
use replicator::{
    Durability, INTERVAL_MAX, INTERVAL_MIN, MAX_LAG_MAX, MAX_LAG_MIN, RateSchedule, RateWindow, SCRUB_INTERVAL_MAX,
    SCRUB_INTERVAL_MIN, Tuning,
};
use toml::de::DeTable;

use super::drill;
use super::error::{ConfigError, ConfigErrors, Problem};
use super::reader::{Found, Reader, Section, flag, list, number, text};
use super::{
    ClientConfig, Config, CopyConfig, DRILL_SPACE_MAX_DEFAULT, DiskConfig, GroupConfig, NodeConfig, ReceiverConfig,
    STATE_DIR_DEFAULT, STOP_TIMEOUT_DEFAULT, TlsConfig, units,
};

/// The kernel's limit on a socket's path, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Io threads by default: more help only many busy disks.
const IO_THREADS_DEFAULT_MAX: usize = 4;
const LOG_LEVELS: &[&str] = &["error", "warn", "info", "debug", "trace"];
const CODECS: &[&str] = &["lz4", "raw"];
const DURABILITIES: &[&str] = &["async", "flush-sync"];
const WHEN_FENCED: &[&str] = &["stop", "continue"];

/// What was seen where, to find things said twice.
#[derive(Default)]
pub(super) struct Seen {
    lines: BTreeMap<String, usize>,
}

impl Seen {
    /// Reports `found` if `what` was seen before.
    pub(super) fn once<T>(&mut self, reader: &mut Reader<'_>, what: String, found: &Found<T>, advice: &'static str) {
        let line = reader.line(found.at);
        match self.lines.get(&what) {
            Some(first) => reader.wrong(found, Problem::Twice { line: *first, advice }),
            None => {
                self.lines.insert(what, line);
            }
        }
    }
}

pub(super) struct Context {
    /// Relative paths start here.
    folder: PathBuf,
    pub(super) seen: Seen,
    /// TLS setting of each export address, and its line.
    tls: BTreeMap<String, (Option<TlsConfig>, usize)>,
}

pub(super) fn parse(file: &Path, source: &str) -> Result<Config, ConfigErrors> {
    let mut reader = Reader::new(file, source);
    let document = match DeTable::parse(source) {
        Ok(document) => document,
        Err(error) => {
            reader.syntax(&error);
            return Err(ConfigErrors(reader.errors));
        }
    };
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let folder = std::path::absolute(&folder).unwrap_or(folder);
    let mut context = Context { folder, seen: Seen::default(), tls: BTreeMap::new() };
    let mut root = Section::root(document.get_ref());
    let section = reader.section(&mut root, "node", "[node]");
    let node = node(&mut reader, section, &context);
    let receiver = reader.section(&mut root, "receiver", "[receiver]").map(|s| receiver(&mut reader, s, &mut context));
    let copies: Copies<'_> = receiver.as_ref().map(Option::as_ref);
    let groups: Vec<_> = reader
        .sections(&mut root, "group", "[[group]]")
        .into_iter()
        .map(|s| group(&mut reader, s, &mut context, copies))
        .collect();
    let drills: Vec<_> = reader
        .sections(&mut root, "drill", "[[drill]]")
        .into_iter()
        .map(|s| drill::drill(&mut reader, s, &context, copies))
        .collect();
    let section = reader.section(&mut root, "hooks", "[hooks]");
    let hooks = section.map(|s| super::hooks::hooks(&mut reader, s, &mut context)).unwrap_or_default();
    reader.finish(root);
    let mut errors = reader.errors;
    errors.sort_by_key(ConfigError::line);
    // A section is `None` only together with an error.
    let built = (
        receiver.map_or(Some(None), |r| r.map(Some)),
        groups.into_iter().collect::<Option<Vec<_>>>(),
        drills.into_iter().collect::<Option<Vec<_>>>(),
    );
    match (built, errors.is_empty()) {
        ((Some(receiver), Some(groups), Some(drills)), true) => Ok(Config { node, receiver, groups, drills, hooks }),
        _ => Err(ConfigErrors(errors)),
    }
}

fn node<'d>(reader: &mut Reader<'d>, section: Option<Section<'d>>, context: &Context) -> NodeConfig {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut node = NodeConfig {
        name: host_name(),
        state_dir: PathBuf::from(STATE_DIR_DEFAULT),
        control: PathBuf::new(),
        metrics: None,
        io_threads: cpus.min(IO_THREADS_DEFAULT_MAX),
        log: "info",
        stop_timeout: STOP_TIMEOUT_DEFAULT,
    };
    let control = section.and_then(|section| node_keys(reader, section, context, &mut node));
    node.control = control.unwrap_or_else(|| node.state_dir.join("control.sock"));
    node
}

/// Fills `node`; returns the control socket if it is given.
fn node_keys<'d>(reader: &mut Reader<'d>, mut section: Section<'d>, context: &Context, node: &mut NodeConfig) -> Option<PathBuf> {
    let s = &mut section;
    if let Some(found) = reader.get(s, "name", text("\"alpha\"", |t| Ok(t.parse::<Name>()?))) {
        node.name = found.value.to_string();
    }
    if let Some(found) = reader.get(s, "state_dir", text("a path in quotes", |t| path(context, t))) {
        node.state_dir = found.value;
    }
    let control = reader.get(s, "control", text("a path in quotes", |t| path(context, t)));
    if let Some(found) = &control
        && let Err(problem) = socket_path(&found.value)
    {
        reader.wrong(found, problem);
    }
    if let Some(found) = reader.get(s, "metrics", text("\"127.0.0.1:9547\"", metrics)) {
        node.metrics = Some(found.value);
    }
    if let Some(found) = reader.get(s, "io_threads", number((1, 64), ("1", "64"))) {
        node.io_threads = found.value as usize;
    }
    if let Some(found) = reader.get(s, "log", text("\"info\"", |t| choice(t, LOG_LEVELS))) {
        node.log = found.value;
    }
    if let Some(found) = reader.get(s, "stop_timeout", text("\"20s\"", units::duration)) {
        node.stop_timeout = found.value;
        if found.value > Duration::from_secs(3600) {
            reader.wrong(&found, Problem::Range { min: "\"0s\"", max: "\"1h\"" });
        }
    }
    reader.finish(section);
    control.map(|found| found.value)
}

fn receiver<'d>(reader: &mut Reader<'d>, mut section: Section<'d>, context: &mut Context) -> Option<ReceiverConfig> {
    let s = &mut section;
    let listen = reader.need(s, "listen", "\"0.0.0.0:7447\"", text("\"0.0.0.0:7447\"", listen));
    let store = reader.need(s, "store", "\"/srv/twinsite\"", text("a path in quotes", |t| path(context, t)));
    let drill_space = reader.get(s, "drill_space_max", text("\"10GiB\"", units::size));
    let flatten = reader.get(s, "flatten", flag);
    let ladder = retention(reader, s).unwrap_or_default();
    let clients: Vec<_> = reader
        .sections(s, "client", "[[receiver.client]]")
        .into_iter()
        .map(|section| client(reader, section, &ladder, &mut context.seen))
        .collect();
    reader.finish(section);
    Some(ReceiverConfig {
        listen: listen?.value,
        store: store?.value,
        flatten: flatten.is_none_or(|found| found.value),
        clients: clients.into_iter().collect::<Option<_>>()?,
        drill_space_max_bytes: drill_space.map_or(DRILL_SPACE_MAX_DEFAULT, |found| found.value),
    })
}

/// `retention`, if it is there.
fn retention<'d>(reader: &mut Reader<'d>, section: &mut Section<'d>) -> Option<receiver::Ladder> {
    let rungs = reader.get(section, "retention", list("a list such as [\"all for 10m\", \"1h for 3d\"]", units::rung))?;
    match receiver::Ladder::new(rungs.value.clone()) {
        Ok(ladder) => Some(ladder),
        Err(error) => {
            reader.wrong(&rungs, Problem::Ladder(error));
            None
        }
    }
}

fn client<'d>(
    reader: &mut Reader<'d>,
    mut section: Section<'d>,
    ladder: &receiver::Ladder,
    seen: &mut Seen,
) -> Option<ClientConfig> {
    section.title = titled("[[receiver.client]]", &section);
    let s = &mut section;
    let name = reader.need(s, "name", "\"alpha\"", text("\"alpha\"", |t| Ok(t.parse::<Name>()?)));
    let key = reader.need(s, "key", "\"SHA256:…\"", text("\"SHA256:…\"", |t| t.parse().map_err(|_| Problem::Key)));
    if let Some(name) = &name {
        seen.once(reader, format!("client {}", name.value), name, "give each client a name of its own");
    }
    if let Some(key) = &key {
        seen.once(reader, format!("key {}", key.value), key, "each machine has one key and one [[receiver.client]]");
    }
    let groups = reader.get(s, "groups", list("a list such as [\"db\", \"web\"]", |t| Ok(t.parse::<Name>()?)));
    if let Some(found) = &groups
        && found.value.is_empty()
    {
        reader.wrong(found, Problem::NoGroups);
    }
    let space = reader.get(s, "space_max", text("\"500GiB\"", units::size));
    let handback = reader.get(s, "handback", flag);
    let own = retention(reader, s);
    let title = section.title.clone();
    let limits = reader.sections(&mut section, "group", "[[receiver.client.group]]");
    let allowed = groups.as_ref().map(|found| found.value.as_slice());
    let limits: Vec<_> = limits.into_iter().map(|of_group| client_group(reader, of_group, (&title, allowed), seen)).collect();
    reader.finish(section);
    Some(ClientConfig {
        name: name?.value,
        key: key?.value,
        groups: groups.map(|found| found.value),
        space_max_bytes: space.map(|found| found.value),
        group_space_max_bytes: limits.into_iter().collect::<Option<_>>()?,
        handback: handback.is_none_or(|found| found.value),
        retention: own.unwrap_or_else(|| ladder.clone()),
    })
}

/// What holds for one group of a client, whether it is there yet or not.
fn client_group<'d>(
    reader: &mut Reader<'d>,
    mut section: Section<'d>,
    (client, allowed): (&str, Option<&[Name]>),
    seen: &mut Seen,
) -> Option<(Name, u64)> {
    section.title = titled("[[receiver.client.group]]", &section);
    let s = &mut section;
    let name = reader.need(s, "name", "\"db\"", text("\"db\"", |t| Ok(t.parse::<Name>()?)));
    if let Some(name) = &name {
        seen.once(reader, format!("{client} group {}", name.value), name, "name each group of a client once");
        if allowed.is_some_and(|allowed| !allowed.contains(&name.value)) {
            reader.wrong(name, Problem::NotInGroups);
        }
    }
    let space = reader.need(s, "space_max", "\"50GiB\"", text("\"50GiB\"", units::size));
    reader.finish(section);
    Some((name?.value, space?.value))
}

/// The `[receiver]`, if there is one; the inner `None` stands for one with errors of its own.
pub(super) type Copies<'c> = Option<Option<&'c ReceiverConfig>>;

fn group<'d>(
    reader: &mut Reader<'d>,
    mut section: Section<'d>,
    context: &mut Context,
    copies: Copies<'_>,
) -> Option<GroupConfig> {
    section.title = titled("[[group]]", &section);
    let s = &mut section;
    let name = reader.need(s, "name", "\"db\"", text("\"db\"", |t| Ok(t.parse::<Name>()?)));
    if let Some(name) = &name {
        context.seen.once(reader, format!("group {}", name.value), name, "give each group a name of its own");
    }
    let peer = reader.need(s, "peer", "\"backup.example.com:7447\"", text("\"backup.example.com:7447\"", peer));
    let peer_key = reader.need(s, "peer_key", "\"SHA256:…\"", text("\"SHA256:…\"", |t| t.parse().map_err(|_| Problem::Key)));
    let defaults = Tuning::default();
    let interval = reader.get(s, "interval", text("\"1s\"", units::duration));
    if let Some(found) = &interval
        && !(INTERVAL_MIN..=INTERVAL_MAX).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"10ms\"", max: "\"1d\"" });
    }
    let budget = reader.get(s, "freeze_budget", text("\"64MiB\"", units::size));
    if let Some(found) = &budget
        && !((1 << 20)..=(16 << 30)).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"1MiB\"", max: "\"16GiB\"" });
    }
    let spill = reader.get(s, "spill_limit", text("\"4GiB\"", units::size));
    if let Some(found) = &spill
        && found.value > 16 << 40
    {
        reader.wrong(found, Problem::Range { min: "\"0B\"", max: "\"16TiB\"" });
    }
    let in_flight = reader.get(s, "epochs_in_flight", number((1, 64), ("1", "64")));
    let codec = reader.get(s, "codec", text("\"lz4\"", |t| choice(t, CODECS)));
    let durability = reader.get(s, "durability", text("\"async\"", |t| choice(t, DURABILITIES)));
    let when_fenced = reader.get(s, "when_fenced", text("\"stop\"", |t| choice(t, WHEN_FENCED)));
    let max_lag = reader.get(s, "max_lag", text("\"5s\"", units::duration));
    if let Some(found) = &max_lag
        && !(MAX_LAG_MIN..=MAX_LAG_MAX).contains(&found.value)
    {
        reader.wrong(found, Problem::Range { min: "\"100ms\"", max: "\"1d\"" });
    }
    let scrub_interval = reader.get(s, "scrub_interval", text("\"7d\"", units::duration_or_off));
    if let Some(found) = &scrub_interval
        && found.value.is_some_and(|given| !(SCRUB_INTERVAL_MIN..=SCRUB_INTERVAL_MAX).contains(&given))
    {
        reader.wrong(found, Problem::Range { min: "\"1s\"", max: "\"365d\"" });
    }
    let limit = reader.get(s, "rate_limit", text("\"20 Mbit/s\"", units::rate));
    let windows = reader.sections(s, "rate_schedule", "[[group.rate_schedule]]");
    let windows: Vec<_> = windows.into_iter().map(|section| window(reader, section)).collect();
    let disks = reader.sections(s, "disk", "[[group.disk]]");
    let copy = reader.get(s, "copy", text("\"alpha/db\"", copy));
    if let Some(found) = &copy {
        check_copy(reader, found, copies, !disks.is_empty());
        let what = format!("copy {}/{}", found.value.client, found.value.group);
        context.seen.once(reader, what, found, "one copy is replicated onward by one group");
    }
    let title = section.title.clone();
    if disks.is_empty() && copy.is_none() && section.peek("copy").is_none() {
        let place = reader.place(section.at);
        reader.errors.push(ConfigError::NoDisk { place, table: title.clone() });
    }
    if let Some(more) = disks.get(GROUP_VOLUMES_MAX) {
        let place = reader.place(more.at);
        reader.errors.push(ConfigError::TooManyDisks { place, table: title, most: GROUP_VOLUMES_MAX });
    }
    let owner = reader.line(section.at);
    let disks: Vec<_> = disks.into_iter().map(|section| disk(reader, section, context, owner)).collect();
    reader.finish(section);
    Some(GroupConfig {
        name: name?.value,
        peer: peer?.value,
        peer_key: peer_key?.value,
        interval: interval.map_or(defaults.interval, |found| found.value),
        freeze_budget_bytes: budget.map_or(defaults.freeze_budget_bytes, |found| found.value),
        spill_limit_bytes: spill.map_or(defaults.spill_limit_bytes, |found| found.value),
        epochs_in_flight: in_flight.map_or(defaults.epochs_in_flight, |found| found.value as u16),
        codec: match codec.map(|found| found.value) {
            Some("raw") => Codec::Raw,
            Some(_) => Codec::Lz4,
            None => defaults.codec,
        },
        writes_when_fenced: when_fenced.is_some_and(|found| found.value == "continue"),
        durability: match durability.map(|found| found.value) {
            Some("flush-sync") => Durability::FlushSync,
            Some(_) => Durability::Async,
            None => defaults.durability,
        },
        max_lag: max_lag.map(|found| found.value),
        rate: RateSchedule {
            limit_bits_per_s: limit.and_then(|found| found.value),
            windows: windows.into_iter().collect::<Option<_>>()?,
        },
        scrub_interval: scrub_interval.map_or(defaults.scrub_interval, |found| found.value),
        disks: disks.into_iter().collect::<Option<_>>()?,
        copy: copy.map(|found| found.value),
    })
}

fn copy(given: &str) -> Result<CopyConfig, Problem> {
    let (client, group) = given.split_once('/').ok_or(Problem::Copy)?;
    let name = |part: &str| part.parse::<Name>().map_err(|_| Problem::Copy);
    Ok(CopyConfig { client: name(client)?, group: name(group)? })
}

fn check_copy(reader: &mut Reader<'_>, found: &Found<CopyConfig>, copies: Copies<'_>, has_disks: bool) {
    if has_disks {
        reader.wrong(found, Problem::CopyAndDisks);
    }
    let Some(receiver) = copies else { return reader.wrong(found, Problem::CopyWithoutReceiver) };
    if let Some(receiver) = receiver {
        check_sent(reader, found, receiver, (Some(&found.value.client), &found.value.group));
    }
}

/// Refuses a copy that no client, or not this one, may send.
pub(super) fn check_sent<T>(
    reader: &mut Reader<'_>,
    found: &Found<T>,
    receiver: &ReceiverConfig,
    (client, group): (Option<&Name>, &Name),
) {
    let mut of_client = receiver.clients.iter().filter(|known| client.is_none_or(|client| *client == known.name)).peekable();
    if of_client.peek().is_none() {
        let known = receiver.clients.iter().map(|client| client.name.to_string()).collect();
        reader.wrong(found, Problem::CopyClient { known });
    } else if !of_client.any(|client| client.groups.as_ref().is_none_or(|groups| groups.contains(group))) {
        reader.wrong(found, Problem::CopyGroup);
    }
}

fn window<'d>(reader: &mut Reader<'d>, mut section: Section<'d>) -> Option<RateWindow> {
    let s = &mut section;
    let from = reader.need(s, "from", "\"22:00\"", text("\"22:00\"", units::time_of_day));
    let to = reader.need(s, "to", "\"06:00\"", text("\"06:00\"", units::time_of_day));
    let limit = reader.need(s, "limit", "\"none\"", text("\"20 Mbit/s\"", units::rate));
    if let (Some(from), Some(to)) = (&from, &to)
        && from.value == to.value
    {
        reader.wrong(to, Problem::EmptyWindow);
    }
    reader.finish(section);
    Some(RateWindow { from: from?.value, to: to?.value, limit_bits_per_s: limit?.value })
}

fn disk<'d>(reader: &mut Reader<'d>, mut section: Section<'d>, context: &mut Context, owner: usize) -> Option<DiskConfig> {
    section.title = titled("[[group.disk]]", &section);
    let s = &mut section;
    let name = reader.need(s, "name", "\"root\"", text("\"root\"", |t| Ok(t.parse::<Name>()?)));
    let disk_path = reader.need(s, "path", "\"/var/lib/images/db.raw\"", text("a path in quotes", |t| path(context, t)));
    let folder = context.folder.clone();
    let address = text("\"unix:/run/twinsite/db.sock\"", |t| export_address(&folder, t));
    let export = reader.need(s, "export", "\"unix:/run/twinsite/db.sock\"", address);
    let direct = reader.get(s, "direct", flag);
    let tls = reader.section(s, "tls", "tls").map(|section| (section.at, tls(reader, section, context)));
    reader.finish(section);
    if let Some(name) = &name {
        context.seen.once(reader, format!("disk {owner} {}", name.value), name, "give each disk of a group a name of its own");
    }
    if let Some(found) = &disk_path {
        context.seen.once(reader, format!("path {}", found.value.display()), found, "one disk is protected by one group");
    }
    if let (Some(name), Some(export)) = (&name, &export) {
        let what = format!("export {} {}", export.value, name.value);
        let advice = "two disks of one name need two addresses: choose another export";
        context.seen.once(reader, what, export, advice);
    }
    let tls = match tls {
        Some((_, None)) => return None,
        Some((at, Some(tls))) => {
            if matches!(export.as_ref().map(|found| &found.value), Some(ListenAddr::Unix(_))) {
                reader.wrong(&Found { value: (), at, key: "tls", text: "{ … }".to_owned() }, Problem::TlsOnUnix);
            }
            Some(tls)
        }
        None => None,
    };
    if let Some(export) = &export {
        let line = reader.line(export.at);
        let first = context.tls.entry(export.value.to_string()).or_insert_with(|| (tls.clone(), line));
        let (differs, line) = (first.0 != tls, first.1);
        if differs {
            reader.wrong(export, Problem::TlsDiffers { line });
        }
    }
    Some(DiskConfig {
        name: name?.value,
        path: disk_path?.value,
        export: export?.value,
        tls,
        direct: direct.is_some_and(|found| found.value),
    })
}

fn tls<'d>(reader: &mut Reader<'d>, mut section: Section<'d>, context: &Context) -> Option<TlsConfig> {
    let s = &mut section;
    let cert = reader.need(s, "cert", "\"/etc/twinsite/nbd.crt\"", text("a path in quotes", |t| path(context, t)));
    let key = reader.need(s, "key", "\"/etc/twinsite/nbd.key\"", text("a path in quotes", |t| path(context, t)));
    let client_ca = reader.get(s, "client_ca", text("a path in quotes", |t| path(context, t)));
    reader.finish(section);
    Some(TlsConfig { cert: cert?.value, key: key?.value, client_ca: client_ca.map(|found| found.value) })
}

fn titled(kind: &str, section: &Section<'_>) -> String {
    match section.peek("name") {
        Some(name) => format!("{kind} '{}'", name.chars().take(64).filter(|c| !c.is_control()).collect::<String>()),
        None => kind.to_owned(),
    }
}

/// What a node calls itself unless it is told: the host's name up to the first dot.
pub(crate) fn host_name() -> String {
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy();
    host.split('.').next().and_then(|h| h.parse::<Name>().ok()).map_or_else(|| "node".to_owned(), |n| n.to_string())
}

pub(super) fn path(context: &Context, given: &str) -> Result<PathBuf, Problem> {
    if given.is_empty() { Err(Problem::EmptyPath) } else { Ok(context.folder.join(given)) }
}

fn socket_path(path: &Path) -> Result<(), Problem> {
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX { Err(Problem::SocketPath { bytes }) } else { Ok(()) }
}

fn listen(given: &str) -> Result<SocketAddr, Problem> {
    given.parse().map_err(|_| Problem::Listen)
}

fn metrics(given: &str) -> Result<SocketAddr, Problem> {
    given.parse().map_err(|_| Problem::Metrics)
}

fn peer(given: &str) -> Result<String, Problem> {
    let (host, port) = given.rsplit_once(':').ok_or(Problem::Peer)?;
    let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
    let legal = !host.is_empty() && !bare_v6 && !host.contains(|c: char| c.is_whitespace() || c == '/');
    match port.parse::<u16>() {
        Ok(port) if port > 0 && legal => Ok(given.to_owned()),
        _ => Err(Problem::Peer),
    }
}

fn choice(given: &str, known: &'static [&'static str]) -> Result<&'static str, Problem> {
    known.iter().find(|k| **k == given).copied().ok_or(Problem::Choice { known })
}

/// The address of an NBD export: `unix:PATH` (relative to `folder`) or `tcp:IP:PORT`.
///
/// # Errors
/// What is wrong with it.
pub fn export_address(folder: &Path, given: &str) -> Result<ListenAddr, Problem> {
    if let Some(path) = given.strip_prefix("unix:") {
        if path.is_empty() {
            return Err(Problem::Export);
        }
        let path = folder.join(path);
        socket_path(&path)?;
        return Ok(ListenAddr::Unix(path));
    }
    given.strip_prefix("tcp:").and_then(|a| a.parse().ok()).map(ListenAddr::Tcp).ok_or(Problem::Export)
}
