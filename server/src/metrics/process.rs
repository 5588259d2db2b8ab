//! The process's metrics, read from the operating system, with Prometheus' standard names. Linux
//! only.
//!
//! The code reads `/proc` itself. Crates for this bring in a large library, or count processor time
//! in whole seconds.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

/// Reads the metrics of this process at each scrape.
#[derive(Debug)]
pub(crate) struct Process;

/// The resources that the process uses.
#[derive(Debug, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    /// When the process started, in seconds since the Unix epoch.
    start_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Usage {
    /// Reads the contents of `/proc/self/stat` and `/proc/stat`. See `man 5 proc`.
    fn read(process: &str, system: &str) -> Option<Self> {
        // The name of the program is in parentheses, and may itself contain spaces and parentheses.
        let (_, fields) = process.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        // `man 5 proc` numbers the fields from 1. The first one after the name is number 3.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let seconds = |ticks: u64| ticks as f64 / clock_ticks_per_second() as f64;
        let booted_at =
            system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse::<u64>().ok()?;
        Some(Self {
            cpu_seconds: seconds(field(14)? + field(15)?),
            start_seconds: booted_at as f64 + seconds(field(22)?),
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * u64::try_from(page_size()).ok()?,
        })
    }

    fn of_this() -> Option<Self> {
        Self::read(&fs::read_to_string("/proc/self/stat").ok()?, &fs::read_to_string("/proc/stat").ok()?)
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut show = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        if let Some(usage) = Usage::of_this() {
            show("process_cpu_seconds", "Processor time used.", &ConstCounter::new(usage.cpu_seconds))?;
            show(
                "process_start_time_seconds",
                "When the process started, in seconds since the Unix epoch.",
                &ConstGauge::new(usage.start_seconds),
            )?;
            show("process_virtual_memory_bytes", "Virtual memory.", &ConstGauge::new(usage.virtual_bytes))?;
            show(
                "process_resident_memory_bytes",
                "Resident memory.",
                &ConstGauge::new(usage.resident_bytes),
            )?;
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // The listing itself has one open.
            let open = open.count().saturating_sub(1);
            show("process_open_fds", "Open file descriptors.", &ConstGauge::new(open as u64))?;
            if let Some(most) = getrlimit(Resource::Nofile).current {
                show("process_max_fds", "The limit on open file descriptors.", &ConstGauge::new(most))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_and_spaces_is_skipped() {
        let process = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 4 0 1000 8192000 300 1";
        let usage = Usage::read(process, "cpu 1 2\nbtime 1700000000\n").expect("a line that can be read");
        let ticks = clock_ticks_per_second() as f64;
        assert_eq!(usage.cpu_seconds, 300.0 / ticks);
        assert_eq!(usage.start_seconds, 1_700_000_000.0 + 1000.0 / ticks);
        assert_eq!((usage.virtual_bytes, usage.resident_bytes), (8_192_000, 300 * page_size() as u64));
        assert_eq!(Usage::read("42 (leased) S 1", "btime 1\n"), None);
    }
}
