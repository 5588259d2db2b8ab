//! The metrics of one daemon.

/// The registry. Each metric is registered once, and the code that counts keeps a handle to it.
pub(crate) mod registry;
/// The metrics that are read from the daemon at each scrape.
pub(crate) mod daemon;
/// The process's metrics, read from the operating system at each scrape.
pub(crate) mod process;
