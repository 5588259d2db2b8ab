//! Results as tables in Markdown, which are readable on a terminal as well.

use std::fmt::Write;

use comfy_table::{Table, presets};

use crate::contender::Contender;
use crate::results::{Outcome, Outcomes, Results};
use crate::summary::{Summary, count};
use crate::workload::{Facts, Workload};

/// The cell of a workload that a contender cannot do.
const NOTHING: &str = "–";

/// Formats all results.
pub(crate) fn of(results: &Results) -> String {
    let mut text = format!("{}\n\n", results.machine.sentence());
    let rounds = results.rounds;
    let _ = write!(
        text,
        "`{}`: {rounds} rounds of {} s, contenders in turn; median (least .. most). Processor shares are medians, \
         in cores, at the largest scale with a result.\n\n",
        results.command, results.seconds
    );
    for line in &results.left_out {
        let _ = writeln!(text, "Left out: {line}.\n");
    }
    for workload in results.outcomes.workloads() {
        let facts = workload.facts();
        let _ = writeln!(text, "### {}\n\n{}\n", facts.title, facts.text);
        let _ = writeln!(text, "{}\n", figures(&results.outcomes, workload, &facts));
        if let Some(ratios) = ratios(&results.outcomes, workload, &facts) {
            let better = if facts.more_is_better { "more than 1 is better" } else { "less than 1 is better" };
            let _ = writeln!(text, "Ratios within each round; {better}:\n\n{ratios}\n");
        }
        for line in remarks(&results.outcomes, workload, &facts) {
            let _ = writeln!(text, "- {line}");
        }
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

/// The columns: one for each scale and figure, with its name.
fn columns(outcomes: &Outcomes, workload: Workload, facts: &Facts) -> Vec<(u32, &'static str, String)> {
    let name = |scale: u32, figure: &str| format!("{} {}: {figure}", count(scale), facts.unit);
    let of_scale = |scale: u32| facts.shown.iter().map(move |figure| (scale, *figure, name(scale, figure)));
    outcomes.scales(workload).into_iter().flat_map(of_scale).collect()
}

fn figures(outcomes: &Outcomes, workload: Workload, facts: &Facts) -> Table {
    let mut table = empty();
    let columns = columns(outcomes, workload, facts);
    let names = columns.iter().map(|(.., name)| name.clone());
    table.set_header([String::new()].into_iter().chain(names).chain(["processors".to_owned()]));
    for contender in outcomes.contenders(workload) {
        let cells =
            columns.iter().map(|(scale, figure, _)| cell(outcomes, workload, *scale, contender, figure));
        let title = contender.title().to_owned();
        table.add_row([title].into_iter().chain(cells).chain([shares(outcomes, workload, contender)]));
    }
    table
}

/// Formats the median, the range and the number of failed rounds.
fn cell(outcomes: &Outcomes, workload: Workload, scale: u32, contender: Contender, figure: &str) -> String {
    let rounds = outcomes.of(workload, scale, contender);
    let failed = rounds.iter().filter(|outcome| outcome.is_err()).count();
    match outcomes.summary(workload, scale, contender, figure) {
        Some(summary) if failed > 0 => format!("{}, {failed} of {} failed", summary.text(), rounds.len()),
        Some(summary) => summary.text(),
        None if failed > 0 => "failed".to_owned(),
        None => NOTHING.to_owned(),
    }
}

/// Formats the median share of the processors for each kind of process, at the largest scale with a
/// result.
fn shares(outcomes: &Outcomes, workload: Workload, contender: Contender) -> String {
    let spent = |scale| {
        let rounds = outcomes.of(workload, scale, contender).iter().flatten();
        rounds.flat_map(|sample| sample.cpu.iter().copied()).collect::<Vec<_>>()
    };
    let scales = outcomes.scales(workload);
    let Some(spent) = scales.into_iter().rev().map(spent).find(|spent| !spent.is_empty()) else {
        return NOTHING.to_owned();
    };
    let mut shares: Vec<String> = Vec::new();
    let mut kinds: Vec<&str> = Vec::new();
    for (kind, _) in &spent {
        if !kinds.contains(kind) {
            kinds.push(kind);
            let median = Summary::of(spent.iter().filter(|(of, _)| of == kind).map(|(_, part)| *part));
            shares.extend(median.map(|share| format!("{kind} {:.2}", share.median)));
        }
    }
    shares.join(", ")
}

fn ratios(outcomes: &Outcomes, workload: Workload, facts: &Facts) -> Option<Table> {
    let columns = columns(outcomes, workload, facts);
    let mut table = empty();
    table.set_header([String::new()].into_iter().chain(columns.iter().map(|(.., name)| name.clone())));
    for ours in outcomes.contenders(workload) {
        for &theirs in ours.yardsticks() {
            let ratio = |(scale, figure, _): &(u32, &'static str, String)| {
                outcomes.ratio(workload, *scale, [ours, theirs], figure).map(|ratio| ratio.text())
            };
            let cells: Vec<Option<String>> = columns.iter().map(ratio).collect();
            if cells.iter().any(Option::is_some) {
                let cells = cells.into_iter().map(|cell| cell.unwrap_or_else(|| NOTHING.to_owned()));
                let title = format!("{} / {}", ours.title(), theirs.title());
                table.add_row([title].into_iter().chain(cells));
            }
        }
    }
    (table.row_count() > 0).then_some(table)
}

/// Describes failures and errors, each with its reason.
fn remarks(outcomes: &Outcomes, workload: Workload, facts: &Facts) -> Vec<String> {
    let mut remarks = Vec::new();
    for scale in outcomes.scales(workload) {
        for contender in outcomes.contenders(workload) {
            let who = format!("{}, {} {}", contender.title(), count(scale), facts.unit);
            for (round, outcome) in outcomes.of(workload, scale, contender).iter().enumerate() {
                remarks.extend(remark(outcome).map(|what| format!("{who}, round {}: {what}", round + 1)));
            }
        }
    }
    remarks
}

fn remark(outcome: &Outcome) -> Option<String> {
    let line = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    match outcome {
        Err(why) => Some(format!("failed: {}", line(why))),
        Ok(sample) if sample.errors > 0 => {
            let first = sample.error.as_deref().map(|error| format!(", the first: {}", line(error)));
            Some(format!("{} errors{}", sample.errors, first.unwrap_or_default()))
        }
        Ok(_) => None,
    }
}

fn empty() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;
    use crate::results::tests::some;

    #[test]
    fn a_table_has_medians_ranges_ratios_and_failures() {
        let text = of(&Results {
            command: "compare".to_owned(),
            machine: Machine::inspect(&[], None),
            rounds: 3,
            seconds: 5,
            left_out: vec!["redis-server is not installed".to_owned()],
            outcomes: some(),
        });
        let has = |cells: &[&str]| {
            let row = |line: &str| {
                line.split('|').map(str::trim).filter(|cell| !cell.is_empty()).eq(cells.iter().copied())
            };
            assert!(text.lines().any(row), "{cells:?} in\n{text}");
        };
        has(&["1 callers: pairs/s", "64 callers: pairs/s", "256 callers: pairs/s", "processors"]);
        let etcd = ["1,100 (1,000 .. 1,200)", "33,000 (30,000 .. 36,000)", "66,000 (60,000 .. 72,000)"];
        has(&["etcd, one node", etcd[0], etcd[1], etcd[2], "etcd 1.20, load 0.30"]);
        let ratio = "3.73 (3.50 .. 4.00)";
        has(&["leased, embedded / etcd, one node", ratio, ratio, ratio]);
        assert!(text.contains("- etcd, one node, 8 waiting, round 2: failed: cut <off>\n"), "{text}");
        assert!(text.contains("Left out: redis-server is not installed.\n"));
    }
}
