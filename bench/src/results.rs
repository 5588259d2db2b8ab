//! All results, and their JSON.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};
use serde_json::json;

use crate::contender::Contender;
use crate::machine::Machine;
use crate::sample::Sample;
use crate::summary::Summary;
use crate::workload::Workload;

/// The result of one round: its figures, or why there are none.
pub(crate) type Outcome = Result<Sample, String>;

/// The results of a comparison.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    /// The command that produced these results.
    pub(crate) command: String,
    pub(crate) machine: Machine,
    pub(crate) rounds: u32,
    pub(crate) seconds: u64,
    /// Which contenders were left out, and why.
    pub(crate) left_out: Vec<String>,
    #[serde(rename = "runs")]
    pub(crate) outcomes: Outcomes,
}

/// The outcomes by workload, scale and contender, one for every round so far.
#[derive(Debug, Default)]
pub(crate) struct Outcomes(BTreeMap<(Workload, u32, Contender), Vec<Outcome>>);

impl Outcomes {
    pub(crate) fn add(&mut self, workload: Workload, scale: u32, contender: Contender, outcome: Outcome) {
        self.0.entry((workload, scale, contender)).or_default().push(outcome);
    }

    pub(crate) fn of(&self, workload: Workload, scale: u32, contender: Contender) -> &[Outcome] {
        self.0.get(&(workload, scale, contender)).map_or(&[], Vec::as_slice)
    }

    pub(crate) fn workloads(&self) -> BTreeSet<Workload> {
        self.0.keys().map(|(workload, ..)| *workload).collect()
    }

    pub(crate) fn scales(&self, of: Workload) -> BTreeSet<u32> {
        self.0.keys().filter(|(workload, ..)| *workload == of).map(|(_, scale, _)| *scale).collect()
    }

    pub(crate) fn contenders(&self, of: Workload) -> BTreeSet<Contender> {
        self.0.keys().filter(|(workload, ..)| *workload == of).map(|(.., contender)| *contender).collect()
    }

    /// A figure of each round.
    pub(crate) fn figures(
        &self,
        workload: Workload,
        scale: u32,
        contender: Contender,
        name: &str,
    ) -> Vec<Option<f64>> {
        let figure = |outcome: &Outcome| outcome.as_ref().ok().and_then(|sample| sample.figure(name));
        self.of(workload, scale, contender).iter().map(figure).collect()
    }

    pub(crate) fn summary(
        &self,
        workload: Workload,
        scale: u32,
        contender: Contender,
        name: &str,
    ) -> Option<Summary> {
        Summary::of(self.figures(workload, scale, contender, name).into_iter().flatten())
    }

    /// The ratio of a contender's figure to another's.
    pub(crate) fn ratio(
        &self,
        workload: Workload,
        scale: u32,
        [ours, theirs]: [Contender; 2],
        name: &str,
    ) -> Option<Summary> {
        let [ours, theirs] = [ours, theirs].map(|one| self.figures(workload, scale, one, name));
        Summary::of_ratios(&ours, &theirs)
    }
}

impl Serialize for Outcomes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut runs = serializer.serialize_seq(Some(self.0.len()))?;
        for ((workload, scale, contender), outcomes) in &self.0 {
            let shown = workload.facts().shown;
            let summary =
                |name: &&'static str| Some((*name, self.summary(*workload, *scale, *contender, name)?));
            let summaries: BTreeMap<_, _> = shown.iter().filter_map(summary).collect();
            let ratio = |other: &Contender| {
                Some((*other, self.ratio(*workload, *scale, [*contender, *other], shown[0])?))
            };
            let ratios: Vec<_> = contender.yardsticks().iter().filter_map(ratio).collect();
            let ratios: Vec<_> =
                ratios.iter().map(|(to, ratio)| json!({ "to": to, "ratio": ratio })).collect();
            runs.serialize_element(&json!({
                "workload": workload,
                "scale": scale,
                "unit": workload.facts().unit,
                "contender": contender,
                "summary": summaries,
                "ratios": ratios,
                "rounds": outcomes.iter().map(one_round).collect::<Vec<_>>(),
            }))?;
        }
        runs.end()
    }
}

fn one_round(outcome: &Outcome) -> serde_json::Value {
    match outcome {
        Ok(sample) => json!(sample),
        Err(why) => json!({ "failed": why }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns outcomes of two workloads, one with three scales and one with a failure.
    pub(crate) fn some() -> Outcomes {
        let mut outcomes = Outcomes::default();
        for round in 0..3 {
            for (scale, factor) in [(1, 1.0), (64, 30.0), (256, 60.0)] {
                for (contender, rate) in [(Contender::Embedded, 4000.0), (Contender::Etcd, 1000.0)] {
                    let mut sample =
                        Sample { cpu: vec![("etcd", 1.204), ("load", 0.3)], ..Sample::default() };
                    sample.note("pairs/s", (rate + f64::from(round) * 100.0) * factor);
                    outcomes.add(Workload::Pairs, scale, contender, Ok(sample));
                }
            }
            let told = if round == 1 { Err("cut <off>".to_owned()) } else { Ok(Sample::default()) };
            outcomes.add(Workload::Handoff, 8, Contender::Etcd, told);
        }
        outcomes
    }

    #[test]
    fn json_has_every_round_and_the_summary() {
        let json = serde_json::to_value(some()).expect("JSON");
        let runs = json.as_array().expect("runs");
        assert_eq!(runs.len(), 7);
        assert_eq!(runs[0]["workload"], "pairs");
        assert_eq!((&runs[0]["contender"], &runs[0]["scale"]), (&json!("embedded"), &json!(1)));
        assert_eq!(
            runs[0]["summary"]["pairs/s"],
            json!({ "median": 4100.0, "least": 4000.0, "most": 4200.0 })
        );
        assert_eq!(runs[0]["ratios"][0]["to"], "etcd");
        assert_eq!(runs[0]["rounds"][2]["figures"]["pairs/s"], 4200.0);
        assert_eq!(runs[0]["rounds"][0]["cpu"]["load"], 0.3);
        assert_eq!(runs[6]["rounds"][1], json!({ "failed": "cut <off>" }));
    }
}
