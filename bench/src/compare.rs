//! The comparison: all installed contenders run the same workloads, in turn and for several rounds.

use std::io::{Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use tokio::time::timeout;

use crate::contender::Contender;
use crate::deployment::Deployment;
use crate::machine::Machine;
use crate::results::{Outcome, Outcomes, Results};
use crate::sample::Sample;
use crate::summary::{count, digits};
use crate::trial::Trial;
use crate::workload::Workload;
use crate::{svg, table};

/// How long a contender may take to start. The first time, a mongod is downloaded.
const READY: Duration = Duration::from_secs(300);

/// Measures leased and other services with the same workloads, in turn.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The workloads [default: all].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WORKLOAD")]
    only: Vec<Workload>,
    /// The contenders [default: all that are installed, without `stub` and `client`].
    #[arg(long, value_enum, value_delimiter = ',', value_name = "CONTENDER")]
    with: Vec<Contender>,
    /// The scales: how many callers, streams or leases [default: those of each workload].
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    at: Vec<u32>,
    /// Run small scales and one round of one second, which takes a few minutes in all.
    #[arg(long)]
    quick: bool,
    /// The number of rounds; the results are their medians [default: 3].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: Option<u32>,
    /// How long a rate is measured; other durations follow from this [default: 5].
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: Option<u64>,
    /// The folder for `table.md`, `results.json` and `scaling.svg`; it is created if missing.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The daemon to start [default: the one beside this program].
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
}

/// Which workloads to measure, with which contenders.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) contenders: Vec<Contender>,
    /// The scales; if empty, those of each workload.
    pub(crate) scales: Vec<u32>,
    pub(crate) quick: bool,
    pub(crate) rounds: u32,
    pub(crate) seconds: u64,
    pub(crate) daemon: Option<PathBuf>,
    /// Where to write the results so far, after each workload of a round.
    pub(crate) out: Option<PathBuf>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    if let Some(folder) = &args.out {
        // Created now, so that a wrong path fails at once and not after an hour.
        std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let all = |named: &[Contender]| match named {
        [] => Contender::value_variants().iter().copied().filter(|one| one.is_usual()).collect(),
        named => named.to_vec(),
    };
    let plan = Plan {
        workloads: if args.only.is_empty() { Workload::value_variants().to_vec() } else { args.only },
        contenders: all(&args.with),
        scales: args.at,
        quick: args.quick,
        rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 3 }),
        seconds: args.seconds.unwrap_or(if args.quick { 1 } else { 5 }),
        daemon: args.daemon,
        out: args.out,
    };
    writeln!(stdout(), "{}", table::of(&plan.run().await?))?;
    Ok(())
}

fn write(folder: &Path, results: &Results) -> Result<()> {
    std::fs::write(folder.join("table.md"), table::of(results))?;
    std::fs::write(folder.join("results.json"), serde_json::to_string_pretty(results)? + "\n")?;
    if let Some(picture) = svg::of(&results.outcomes) {
        std::fs::write(folder.join("scaling.svg"), picture)?;
    }
    Ok(())
}

impl Plan {
    /// Measures everything. After Ctrl-C it returns the results so far.
    pub(crate) async fn run(mut self) -> Result<Results> {
        let missing: Vec<&str> = self.contenders.iter().filter_map(|one| one.missing()).collect();
        self.contenders.retain(|one| one.missing().is_none());
        ensure!(!self.contenders.is_empty(), "no contender is left: {}", missing.join("; "));
        let mut left_out: Vec<String> = missing.into_iter().map(ToOwned::to_owned).collect();
        left_out.dedup();
        let mut results = Results {
            command: std::iter::once("leased-bench".to_owned())
                .chain(std::env::args().skip(1))
                .collect::<Vec<_>>()
                .join(" "),
            machine: Machine::inspect(&self.contenders, self.daemon.as_deref()),
            rounds: self.rounds,
            seconds: self.seconds,
            left_out,
            outcomes: Outcomes::default(),
        };
        tokio::select! {
            measured = self.measure(&mut results) => measured?,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                let _ = writeln!(stderr(), "interrupted; the results so far:");
                if let Some(folder) = &self.out {
                    write(folder, &results)?;
                }
            }
        }
        Ok(results)
    }

    async fn measure(&self, results: &mut Results) -> Result<()> {
        for round in 1..=self.rounds {
            for &workload in &self.workloads {
                for &contender in &self.contenders {
                    let scales: Vec<u32> = self
                        .scales(workload)
                        .iter()
                        .copied()
                        .filter(|scale| workload.supports(contender, *scale))
                        .collect();
                    if !scales.is_empty() {
                        self.one(results, round, workload, contender, &scales).await;
                    }
                }
                if let Some(folder) = &self.out {
                    write(folder, results)?;
                }
            }
        }
        Ok(())
    }

    fn scales(&self, workload: Workload) -> &[u32] {
        match (&self.scales[..], self.quick) {
            ([], true) => workload.facts().quick,
            ([], false) => workload.facts().scales,
            (named, _) => named,
        }
    }

    /// Measures one contender in a round, at all scales of a workload.
    async fn one(
        &self,
        results: &mut Results,
        round: u32,
        workload: Workload,
        contender: Contender,
        scales: &[u32],
    ) {
        for &scale in scales {
            let outcome = self.trial(results, workload, contender, scale).await;
            let outcome = outcome.map_err(|error| format!("{error:#}"));
            let who = format!("{} {}, {}", count(scale), workload.facts().unit, contender.title());
            // A measurement goes on if its progress cannot be printed.
            let _ = writeln!(
                stderr(),
                "round {round} of {}  {}, {who}: {}",
                self.rounds,
                workload.name(),
                line(workload, &outcome)
            );
            results.outcomes.add(workload, scale, contender, outcome);
        }
    }

    /// Runs one trial, with its own processes.
    async fn trial(
        &self,
        results: &mut Results,
        workload: Workload,
        contender: Contender,
        scale: u32,
    ) -> Result<Sample> {
        let deployment = timeout(READY, Deployment::start(contender, workload, self.daemon.as_deref())).await;
        let deployment = deployment.context("the contender does not start in time")??;
        if let Some(uri) = deployment.mongodb() {
            // A failure is ignored: the version is only for the heading.
            let _ = results.machine.note_mongod(uri).await;
        }
        let (scale, time) = (scale as usize, Duration::from_secs(self.seconds));
        Trial { contender, workload, scale, time, deployment: &deployment }.run().await
    }
}

/// Formats the outcome of a round for the progress.
fn line(workload: Workload, outcome: &Outcome) -> String {
    match outcome {
        Ok(sample) => {
            let figure = |name: &&str| Some(format!("{} {name}", digits(sample.figure(name)?)));
            let figures: Vec<String> = workload.facts().shown.iter().filter_map(figure).collect();
            format!("{}{}", figures.join(", "), spent(sample))
        }
        Err(why) => format!("failed: {why}"),
    }
}

fn spent(sample: &Sample) -> String {
    let shares: Vec<String> = sample.cpu.iter().map(|(kind, part)| format!("{kind} {part:.2}")).collect();
    let errors = if sample.errors > 0 { format!("; {} errors", sample.errors) } else { String::new() };
    if shares.is_empty() { errors } else { format!("  ({}){errors}", shares.join(", ")) }
}
