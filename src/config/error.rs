//! What can be wrong with a configuration. Every message is one line: where, what, what to do.

use std::fmt;
use std::io;
use std::path::PathBuf;

use proto::name::NameError;

/// A line of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file as given.
    pub file: PathBuf,
    /// Counted from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// What is wrong with a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Another TOML type.
    #[error("is {found}, not {wanted}: write {example}")]
    Type {
        /// What is there.
        found: &'static str,
        /// What belongs there.
        wanted: &'static str,
        /// As it should look.
        example: &'static str,
    },
    /// No rung of a ladder.
    #[error("is no rung: write \"all for 10m\", or \"1h for 3d\" for one point an hour up to an age of three days")]
    Rung,
    /// Rungs that are no ladder.
    #[error("is no ladder: {0}")]
    Ladder(receiver::LadderError),
    /// No size.
    #[error("is not a size: write a number and a unit, for example \"64MiB\" or \"500GB\"")]
    Size,
    /// No duration.
    #[error("is not a duration: write a number and a unit, for example \"250ms\", \"1s\" or \"5m\"")]
    Duration,
    /// No duration, where there may be none.
    #[error("is not a duration: write a number and a unit, for example \"7d\" or \"12h\", or \"off\"")]
    DurationOrOff,
    /// No rate.
    #[error("is not a rate: write bits a second from \"64 kbit/s\" to \"1000 Gbit/s\", for example \"20 Mbit/s\", or \"none\"")]
    Rate,
    /// No time of day.
    #[error("is not a time of day: write hours and minutes, for example \"22:00\"")]
    TimeOfDay,
    /// A window without length.
    #[error("is the same time as from: give the window a length; what holds all day is rate_limit")]
    EmptyWindow,
    /// Outside its limits.
    #[error("is outside of its limits: choose a value from {min} to {max}")]
    Range {
        /// Smallest.
        min: &'static str,
        /// Largest.
        max: &'static str,
    },
    /// None of the known words.
    #[error("is not known here: choose one of {}", known.join(", "))]
    Choice {
        /// The words.
        known: &'static [&'static str],
    },
    /// A group that the client may not send.
    #[error("is not in the client's groups: add it there, or leave groups out to allow any")]
    NotInGroups,
    /// No name.
    #[error("is not a name: write 1 to 64 of a-z A-Z 0-9 . _ - starting with a letter or digit")]
    Name,
    /// No key.
    #[error("is not a key: copy the SHA256:… line that `twinsite id` prints on the other machine")]
    Key,
    /// No peer.
    #[error("is not an address: write host:port, for example \"backup.example.com:7447\"")]
    Peer,
    /// No local address.
    #[error("is not a local address: write an IP address and a port, for example \"0.0.0.0:7447\"")]
    Listen,
    /// No local address, of metrics.
    #[error("is not a local address: write an IP address and a port, for example \"127.0.0.1:9547\"")]
    Metrics,
    /// No export address.
    #[error("is not an export address: write \"unix:/path/to/socket\" or \"tcp:127.0.0.1:10809\"")]
    Export,
    /// The kernel bounds the paths of sockets.
    #[error("is too long for a unix socket ({bytes} bytes, at most 107): choose a shorter path")]
    SocketPath {
        /// Its length.
        bytes: usize,
    },
    /// The empty string.
    #[error("is empty: give a path")]
    EmptyPath,
    /// The same value elsewhere, where it must be unique.
    #[error("is already used on line {line}: {advice}")]
    Twice {
        /// The other line.
        line: usize,
        /// What to do.
        advice: &'static str,
    },
    /// Two disks on one address disagree on TLS.
    #[error("has another tls setting than line {line}: give all disks of one address the same tls")]
    TlsDiffers {
        /// The other line.
        line: usize,
    },
    /// TLS on a unix socket.
    #[error("is for tcp exports only: remove it, or export over tcp")]
    TlsOnUnix,
    /// Two times.
    #[error("is given beside every: keep one of the two")]
    EveryAndAt,
    /// No copy.
    #[error("is not a copy: write CLIENT/GROUP, for example \"alpha/db\"")]
    Copy,
    /// A copy of a client that is not there.
    #[error("is of a client that is not known here: {}", clients_known(.known))]
    CopyClient {
        /// Those that are.
        known: Vec<String>,
    },
    /// A copy that its client may not send.
    #[error("is a group that its client may not send: add it to groups of that [[receiver.client]]")]
    CopyGroup,
    /// A copy, and disks too.
    #[error("is given beside [[group.disk]]: a group replicates disks or a copy; make two groups of it")]
    CopyAndDisks,
    /// A copy without a receiver.
    #[error("needs a [receiver]: a copy is replicated onward by the node that keeps it")]
    CopyWithoutReceiver,
    /// An array with nothing in it.
    #[error("is empty: name at least one group, or remove the key to allow every group")]
    NoGroups,
}

fn clients_known(known: &[String]) -> String {
    if known.is_empty() {
        "add a [[receiver.client]]".to_owned()
    } else {
        format!("the names of [[receiver.client]] are {}", known.join(", "))
    }
}

impl From<NameError> for Problem {
    fn from(_: NameError) -> Self {
        Self::Name
    }
}

/// One thing wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot read the configuration: {source}: name the file with --config FILE", file.display())]
    Read {
        /// The file as given.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// Where.
        place: Place,
        /// The parser's words, in one line.
        message: String,
    },
    /// A key or section that does not exist.
    #[error("{place}: unknown key '{key}' in {table}{}", advise(nearest, known))]
    UnknownKey {
        /// Where.
        place: Place,
        /// As written.
        key: String,
        /// The section.
        table: String,
        /// The known key that looks most like it.
        nearest: Option<&'static str>,
        /// All keys of the section.
        known: Vec<&'static str>,
    },
    /// A key that must be there.
    #[error("{place}: {table} has no key '{key}': add a line such as {key} = {example}")]
    Missing {
        /// Where the section starts.
        place: Place,
        /// The section.
        table: String,
        /// The key.
        key: &'static str,
        /// As it should look.
        example: &'static str,
    },
    /// A section that must be there.
    #[error(
        "{place}: {table} has no disk: add a [[group.disk]] section below it, or copy = \"CLIENT/GROUP\" to replicate a copy onward"
    )]
    NoDisk {
        /// Where the group starts.
        place: Place,
        /// The group.
        table: String,
    },
    /// More disks than are cut together.
    #[error("{place}: {table} has more than {most} disks: make two groups of it")]
    TooManyDisks {
        /// Where the first is that is too many.
        place: Place,
        /// The group.
        table: String,
        /// The limit.
        most: usize,
    },
    /// A value that makes no sense.
    #[error("{place}: {key} = {value}: {problem}")]
    Value {
        /// Where.
        place: Place,
        /// Its key.
        key: String,
        /// As written.
        value: String,
        /// What is wrong and what to do.
        problem: Problem,
    },
    /// A drill without copies.
    #[error("{place}: [[drill]] needs a [receiver]: drills are done where the copies are; move it to that node's configuration")]
    DrillWithoutCopies {
        /// Where.
        place: Place,
    },
    /// Nothing to run.
    #[error("{}: neither a [receiver] nor a [[group]]: this node would do nothing; add one of them", file.display())]
    Empty {
        /// The file as given.
        file: PathBuf,
    },
}

impl ConfigError {
    /// The line it is on; 0 if it is about the whole file.
    #[must_use]
    pub fn line(&self) -> usize {
        match self {
            Self::Read { .. } | Self::Empty { .. } => 0,
            Self::Syntax { place, .. }
            | Self::UnknownKey { place, .. }
            | Self::Missing { place, .. }
            | Self::NoDisk { place, .. }
            | Self::TooManyDisks { place, .. }
            | Self::DrillWithoutCopies { place }
            | Self::Value { place, .. } => place.line,
        }
    }
}

fn advise(nearest: &Option<&'static str>, known: &[&'static str]) -> String {
    match nearest {
        Some(key) => format!(": did you mean '{key}'?"),
        None => format!(": known keys are {}", known.join(", ")),
    }
}

/// All that is wrong with a file, in the order of its lines.
#[derive(Debug)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
