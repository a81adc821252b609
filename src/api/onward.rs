//! Copies that go on to a third site.

use proto::{Name, Point};
use serde::{Deserialize, Serialize};

/// What the disks of an onward group are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnwardState {
    /// Nothing yet; see `error`.
    Waiting,
    /// The newest point of the copy.
    Following,
    /// The active copy, as its guests write it.
    Active,
    /// Not what the copy is: its guests write past the group; see `error`.
    Bypassed,
}

/// A group whose disks are a copy of this node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OnwardStatus {
    /// The group.
    pub group: Name,
    /// The copy, as `CLIENT/GROUP`.
    pub copy: String,
    /// What its disks are.
    pub state: OnwardState,
    /// The point that they are, while following.
    pub point: Option<Point>,
    /// Why there is nothing, or nothing newer, one line.
    pub error: Option<String>,
}
