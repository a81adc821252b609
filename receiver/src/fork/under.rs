//! What a fork is laid over: the view of a point, or, for a drill, a fork that is kept.

use std::ops::Deref;
use std::sync::Arc;

use blockdev::BlockDevice;

use super::device::ForkDevice;
use crate::view::View;

/// Nothing ever writes to it.
#[derive(Clone, Debug)]
pub(crate) enum Under {
    View(Arc<View>),
    Kept(Arc<ForkDevice>),
}

impl Deref for Under {
    type Target = dyn BlockDevice;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::View(view) => &**view,
            Self::Kept(fork) => &**fork,
        }
    }
}
