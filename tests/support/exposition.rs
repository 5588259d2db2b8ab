//! A strict parser of metrics in Prometheus' text format, version 0.0.4. Rejects whatever the
//! format or the naming conventions of Prometheus do not allow.
//!
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>,
//! <https://prometheus.io/docs/practices/naming/>

use std::collections::{BTreeMap, BTreeSet};

pub(crate) type Labels = BTreeMap<String, String>;

/// The metric families of a scrape, by name.
#[derive(Debug, Default)]
pub(crate) struct Exposition(pub BTreeMap<String, Family>);

#[derive(Debug)]
pub(crate) struct Family {
    pub kind: String,
    /// The label names of its samples, without `le`.
    pub labels: BTreeSet<String>,
    samples: Vec<Sample>,
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: Labels,
    value: f64,
}

impl Exposition {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.strip_suffix('\n').ok_or("the text does not end with a newline")?;
        let mut families = BTreeMap::new();
        let mut lines = text.split('\n').peekable();
        while let Some(line) = lines.next() {
            let help = line.strip_prefix("# HELP ").and_then(|line| line.split_once(' '));
            let (name, help) = help.ok_or_else(|| format!("not a line of help: {line}"))?;
            let line = lines.next().unwrap_or_default();
            let kind = line.strip_prefix("# TYPE ").and_then(|line| line.strip_prefix(name));
            let kind =
                kind.and_then(|kind| kind.strip_prefix(' ')).ok_or_else(|| format!("no type: {line}"))?;
            let mut samples = Vec::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                samples.push(parse_sample(line)?);
            }
            let family = Family::new(name, help, kind, samples).map_err(|why| format!("{name}: {why}"))?;
            if families.insert(name.to_owned(), family).is_some() {
                return Err(format!("{name} is listed twice"));
            }
        }
        Ok(Self(families))
    }

    /// Returns the sum of all samples with this name whose labels include these.
    pub(crate) fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let bare = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let family = self.0.get(name).or_else(|| self.0.get(bare?));
        let samples = family.unwrap_or_else(|| panic!("no {name}")).samples.iter();
        let has = |sample: &&Sample| {
            labels.iter().all(|(label, value)| sample.labels.get(*label).is_some_and(|found| found == value))
        };
        let found: Vec<f64> =
            samples.filter(|sample| sample.name == name).filter(has).map(|sample| sample.value).collect();
        assert!(!found.is_empty(), "no {name} has {labels:?}");
        found.iter().sum()
    }
}

impl Family {
    fn new(name: &str, help: &str, kind: &str, samples: Vec<Sample>) -> Result<Self, String> {
        ensure(is_name(name), "not a name")?;
        ensure(!help.is_empty(), "no help")?;
        ensure(!samples.is_empty(), "no samples")?;
        ensure(matches!(kind, "counter" | "gauge" | "histogram"), "an unknown type")?;
        ensure(name.ends_with("_total") == (kind == "counter"), "only the names of counters end in _total")?;
        let suffixes = if kind == "histogram" { &["_bucket", "_sum", "_count"][..] } else { &[""] };
        let mut labels: Option<BTreeSet<String>> = None;
        let mut seen = BTreeSet::new();
        for sample in &samples {
            let suffix = sample.name.strip_prefix(name).filter(|suffix| suffixes.contains(suffix));
            let suffix = suffix.ok_or_else(|| format!("{} belongs to another family", sample.name))?;
            let mut names: BTreeSet<String> = sample.labels.keys().cloned().collect();
            ensure(names.remove("le") == (suffix == "_bucket"), "only buckets have the label le")?;
            ensure(labels.get_or_insert_with(|| names.clone()) == &names, "samples differ in their labels")?;
            ensure(seen.insert((&sample.name, &sample.labels)), "a sample is listed twice")?;
            let is_count = kind != "gauge";
            ensure(
                !is_count || (sample.value >= 0.0 && sample.value.is_finite()),
                "a count is negative or not finite",
            )?;
        }
        if kind == "histogram" {
            check_histograms(name, &samples)?;
        }
        Ok(Self { kind: kind.to_owned(), labels: labels.unwrap_or_default(), samples })
    }
}

/// Checks that each histogram of a family is complete: rising buckets, then the sum, then the
/// count.
fn check_histograms(name: &str, samples: &[Sample]) -> Result<(), String> {
    let mut samples = samples.iter().peekable();
    while samples.peek().is_some() {
        let mut last: Option<(f64, f64, Labels)> = None;
        while let Some(sample) = samples.next_if(|sample| sample.name.ends_with("_bucket")) {
            let mut labels = sample.labels.clone();
            let bound = parse_number(&labels.remove("le").unwrap_or_default())?;
            if let Some((lower, fewer, others)) = &last {
                ensure(*lower < bound, "bounds do not rise")?;
                ensure(*fewer <= sample.value, "a bucket holds less than the one before")?;
                ensure(*others == labels, "a histogram begins within another")?;
            }
            last = Some((bound, sample.value, labels));
        }
        let (bound, all, labels) = last.ok_or("a histogram without buckets")?;
        ensure(bound == f64::INFINITY, "the last bucket has a bound")?;
        for (suffix, value) in [("_sum", None), ("_count", Some(all))] {
            let sample = samples.next().ok_or("a histogram breaks off")?;
            ensure(
                sample.name == format!("{name}{suffix}") && sample.labels == labels,
                "a sum or count does not belong to the buckets before it",
            )?;
            ensure(value.is_none_or(|value| value == sample.value), "the last bucket is not the count")?;
        }
    }
    Ok(())
}

/// Parses `name{label="value",…} number`.
fn parse_sample(line: &str) -> Result<Sample, String> {
    let error = || format!("not a sample: {line}");
    let end = line.find(['{', ' ']).ok_or_else(error)?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            let (label, quoted) = rest.split_once("=\"").ok_or_else(error)?;
            let (value, after) = split_quoted(quoted).ok_or_else(error)?;
            ensure(is_name(label) && !label.contains(':'), &error())?;
            ensure(labels.insert(label.to_owned(), value).is_none(), &error())?;
            match after.strip_prefix(',') {
                Some(more) => rest = more,
                None => {
                    rest = after.strip_prefix('}').ok_or_else(error)?;
                    break;
                }
            }
        }
    }
    let value = parse_number(rest.strip_prefix(' ').ok_or_else(error)?)?;
    Ok(Sample { name: name.to_owned(), labels, value })
}

/// Splits a quoted label value, whose opening quotation mark is already read, from the text after
/// it.
fn split_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut rest = text.chars();
    loop {
        match rest.next()? {
            '"' => return Some((value, rest.as_str())),
            '\\' => value.push(match rest.next()? {
                'n' => '\n',
                escaped @ ('\\' | '"') => escaped,
                _ => return None,
            }),
            plain => value.push(plain),
        }
    }
}

/// Parses a number as Go writes it. A timestamp after it is an error.
fn parse_number(text: &str) -> Result<f64, String> {
    let error = || format!("not a number: {text}");
    match text {
        "+Inf" => Ok(f64::INFINITY),
        "-Inf" => Ok(f64::NEG_INFINITY),
        "NaN" => Ok(f64::NAN),
        _ => text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(error),
    }
}

fn is_name(text: &str) -> bool {
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | ':');
    text.chars().all(is_part) && text.starts_with(|first: char| !first.is_ascii_digit())
}

fn ensure(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

const GOOD: &str = r#"# HELP a_total How often.
# TYPE a_total counter
a_total{who="me \"\\\n"} 3
a_total{who="you"} 0
# HELP b_seconds How long.
# TYPE b_seconds histogram
b_seconds_bucket{le="0.5"} 1
b_seconds_bucket{le="1"} 2
b_seconds_bucket{le="+Inf"} 3
b_seconds_sum 2.5
b_seconds_count 3
# HELP c How much.
# TYPE c gauge
c NaN
"#;

#[test]
fn a_valid_exposition_is_parsed() {
    let read = Exposition::parse(GOOD).unwrap();
    assert_eq!(read.value("a_total", &[]), 3.0);
    assert_eq!(read.value("a_total", &[("who", "you")]), 0.0);
    assert_eq!(read.value("b_seconds_bucket", &[("le", "1")]), 2.0);
    assert_eq!(read.value("b_seconds_count", &[]), 3.0);
    assert!(read.value("c", &[]).is_nan());
}

#[test]
fn an_invalid_exposition_is_rejected() {
    for (valid, invalid) in [
        ("c NaN\n", "c NaN"),
        ("c NaN", "c nan"),
        ("c NaN", "c 1 1700000000000"),
        ("c NaN", "c 1\nc 1"),
        ("c NaN", "d 1"),
        ("c NaN\n", ""),
        ("c NaN", "c 1\n"),
        ("# HELP c How much.\n", ""),
        ("# HELP c How much.", "# HELP c "),
        ("# TYPE c gauge\n", ""),
        ("# TYPE c gauge", "# TYPE c counter"),
        ("# TYPE c gauge", "# TYPE c number"),
        ("# TYPE a_total counter", "# TYPE a_total gauge"),
        ("a_total{who=\"you\"} 0", "a_total{who=\"you\"} -1"),
        ("a_total{who=\"you\"} 0", "a_total{what=\"you\"} 0"),
        ("a_total{who=\"you\"} 0", "a_total 0"),
        ("a_total{who=\"you\"} 0", "a_total{who=\"you\" 0"),
        ("who=\"you\"", "1=\"you\""),
        ("me \\\"", "me \\q"),
        ("le=\"0.5\"", "le=\"1\""),
        ("le=\"0.5\"} 1", "le=\"0.5\"} 3"),
        ("le=\"+Inf\"", "le=\"2\""),
        ("b_seconds_bucket{le=\"+Inf\"} 3\n", ""),
        ("b_seconds_sum 2.5\n", ""),
        ("b_seconds_count 3", "b_seconds_count 2"),
        (
            "# HELP c How much.\n# TYPE c gauge\nc NaN",
            "# HELP a_total How often.\n# TYPE a_total counter\na_total 1",
        ),
    ] {
        assert!(GOOD.contains(valid), "{valid}");
        let text = GOOD.replacen(valid, invalid, 1);
        assert!(Exposition::parse(&text).is_err(), "{invalid:?} instead of {valid:?}");
    }
}
