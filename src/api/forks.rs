//! What the control socket says of kept forks.

use proto::Name;
use serde::{Deserialize, Serialize};

pub use receiver::KeptFork;

/// `GET /v1/forks?group=`: without a group, those of all.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkList {
    /// By client, group and name.
    pub forks: Vec<ListedFork>,
}

/// A kept fork and whose it is; also the answer to a [`ForkRemoval`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedFork {
    /// Whose primary wrote it.
    pub client: Name,
    /// The group.
    pub group: Name,
    /// The fork.
    #[serde(flatten)]
    pub fork: KeptFork,
}

/// `POST /v1/forks/remove`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkRemoval {
    /// `GROUP` or `CLIENT/GROUP`.
    pub group: String,
    /// The fork. Nothing of it is left.
    pub fork: Name,
}
