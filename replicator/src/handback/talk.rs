//! The connection of a handback, and why one ends.

use blockdev::FrameStreamError;
use proto::{CloseCode, DecodeError, Message};
use quinn::{Connection, Endpoint, SendStream};
use tokio::sync::mpsc;

use super::READY_DEADLINE;
use crate::capture::CaptureError;
use crate::link::{self, ControlError, LinkError};
use crate::record::RecordError;

/// Why a conversation ends; becomes the reason of a [`HandbackError`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("receiver: {0}")]
    Refused(String),
    #[error("the receiver sent {message} while this side was {state}")]
    Unexpected { message: &'static str, state: &'static str },
    #[error("the receiver sent what is no frame: {0}")]
    Decode(#[from] DecodeError),
    #[error("the receiver sent pass {got}, expected {expected}")]
    Order { got: u16, expected: u16 },
    #[error("the receiver sent a frame of volume {volume}, the group has {volumes}")]
    Volume { volume: u16, volumes: usize },
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("disk: {0}")]
    Disk(#[from] std::io::Error),
    #[error("the connection broke: {0}")]
    Lost(String),
    #[error("what was written last was not done, and committed, in time")]
    NotDrained,
    #[error("the node is stopping")]
    Stopping,
    #[error("the receiver did not answer within {} s", READY_DEADLINE.as_secs())]
    Silent,
}

impl From<FrameStreamError> for Broken {
    fn from(error: FrameStreamError) -> Self {
        match error {
            FrameStreamError::Decode(error) => error.into(),
            FrameStreamError::Volume { volume, volumes } => Self::Volume { volume, volumes },
            FrameStreamError::Read(error) => Self::Lost(error.to_string()),
        }
    }
}

impl From<quinn::WriteError> for Broken {
    fn from(error: quinn::WriteError) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<quinn::ConnectionError> for Broken {
    fn from(error: quinn::ConnectionError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// A conversation that was begun.
pub(super) struct Talk {
    pub(super) connection: Connection,
    pub(super) _endpoint: Endpoint,
    pub(super) control: SendStream,
    pub(super) messages: mpsc::Receiver<Result<Message, ControlError>>,
}

impl Talk {
    pub(super) async fn say(&mut self, message: &Message) -> Result<(), Broken> {
        Ok(self.control.write_all(&message.encode()).await?)
    }

    /// The next message. Loses nothing when it is dropped.
    pub(super) async fn hear(&mut self) -> Result<Message, Broken> {
        self.messages.recv().await.unwrap_or(Err(ControlError::Ended)).map_err(Broken::from)
    }

    pub(super) fn end(&self) {
        link::close(&self.connection, CloseCode::Stopping, "the handback is over");
    }
}
