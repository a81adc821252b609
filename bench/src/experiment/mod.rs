//! One experiment a file: each returns a [`Report`](crate::report::Report), prints nothing but progress, and leaves nothing behind.

pub(crate) mod nbd;
