//! The metrics of one daemon.

/// The registry. Each metric is registered once, and its callers keep handles.
pub(crate) mod registry;
/// What is read from the daemon at each scrape.
pub(crate) mod daemon;
/// What the operating system says of the process at each scrape.
pub(crate) mod process;
