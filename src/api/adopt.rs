//! Images that were carried over by hand.

use std::path::PathBuf;

use proto::Name;
use serde::{Deserialize, Serialize};

/// `POST /v1/adopt`; `GET /v1/adopt?group=` tells how far it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptRequest {
    /// `GROUP` or `CLIENT/GROUP`; the group must not be there yet.
    pub group: String,
    /// Its disks, in the order of the primary's configuration.
    pub disks: Vec<AdoptDisk>,
}

/// A disk and its image.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdoptDisk {
    /// The disk.
    pub disk: Name,
    /// A raw image or a block device, absolute.
    pub from: PathBuf,
}

/// How far it is, or how it ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AdoptStatus {
    /// Whose.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// Whether it still runs.
    pub running: bool,
    /// Why it failed, one line.
    pub error: Option<String>,
    /// Bytes of the images dealt with.
    pub done_bytes: u64,
    /// Their size; 0 until it is known.
    pub total_bytes: u64,
    /// How long it has run, in ms.
    pub elapsed_ms: u64,
}
