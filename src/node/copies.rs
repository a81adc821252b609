//! The copies this node keeps, in the words of the control socket: the only place that knows the receiver's own types.

use std::fmt;
use std::sync::Arc;

use blockdev::{BlockDevice, IoThreads};
use proto::{Generation, Identity, Name, Point};

use super::failover::RequestError;
use super::record::ExportRecord;
use crate::api::{CopyStatus, Points};
use crate::config::ReceiverConfig;

/// A group at the receiver: names are unique for each client only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupRef {
    pub(crate) client: Name,
    pub(crate) group: Name,
}

impl fmt::Display for GroupRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client, self.group)
    }
}

/// An active copy.
pub(crate) struct Activated {
    pub(crate) point: Point,
    pub(crate) generation: Generation,
    pub(crate) volumes: Vec<(Name, Arc<dyn BlockDevice>)>,
}

/// The receiver.
pub(crate) struct Copies {}

impl Copies {
    pub(crate) async fn start(_config: &ReceiverConfig, _identity: Identity, _io: &IoThreads) -> Result<Self, String> {
        Err("not part of this build yet".to_owned())
    }

    pub(crate) fn status(&self, _record: &ExportRecord) -> Vec<CopyStatus> {
        Vec::new()
    }

    pub(crate) fn find(&self, selector: &str) -> Result<GroupRef, RequestError> {
        Err(RequestError::UnknownGroup { given: selector.to_owned(), known: Vec::new() })
    }

    pub(crate) fn points(&self, selector: &str) -> Result<Points, RequestError> {
        Err(RequestError::UnknownGroup { given: selector.to_owned(), known: Vec::new() })
    }

    pub(crate) async fn failover(&self, group: &GroupRef, _point: Option<Point>) -> Result<Activated, RequestError> {
        Err(RequestError::NoPoint { group: group.to_string() })
    }

    pub(crate) fn activated(&self, group: &GroupRef) -> Result<Activated, RequestError> {
        Err(RequestError::NoPoint { group: group.to_string() })
    }

    pub(crate) fn all_activated(&self) -> Vec<(GroupRef, Activated)> {
        Vec::new()
    }

    pub(crate) async fn shutdown(&self) {}
}
