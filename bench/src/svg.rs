//! Scaling curves as a picture: a panel for each workload with three scales or more. Both axes are
//! logarithmic.
//!
//! The SVG is written without a library: it is only lines and text, and a chart library would add
//! fonts or JavaScript.

use std::fmt::Write;

use crate::contender::Contender;
use crate::results::Outcomes;
use crate::summary::digits;
use crate::workload::Workload;

const WIDTH: f64 = 760.0;
const PANEL: f64 = 300.0;
/// The margin above a plot, for the title.
const TOP: f64 = 40.0;
/// The margin to the right of a plot, for the legend.
const RIGHT: f64 = 230.0;
/// The margin below a plot, for numbers.
const BOTTOM: f64 = 45.0;
/// The margin to the left of a plot, for numbers.
const LEFT: f64 = 110.0;

/// A curve: a contender, and its points as scale and figure.
type Curve = (Contender, Vec<(f64, f64)>);

/// Draws the picture. `None` if no workload has three scales.
pub(crate) fn of(outcomes: &Outcomes) -> Option<String> {
    let panels: Vec<(Workload, Vec<Curve>)> = outcomes
        .workloads()
        .into_iter()
        .filter(|workload| outcomes.scales(*workload).len() > 2)
        .map(|workload| (workload, curves(outcomes, workload)))
        .filter(|(_, curves)| !curves.is_empty())
        .collect();
    if panels.is_empty() {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "a few panels")]
    let height = PANEL * panels.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let mut top = 0.0;
    for (workload, curves) in &panels {
        panel(&mut svg, *workload, curves, top);
        top += PANEL;
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

fn curves(outcomes: &Outcomes, workload: Workload) -> Vec<Curve> {
    let figure = workload.facts().shown[0];
    let curve = |contender| {
        let point = |scale| {
            let median = outcomes.summary(workload, scale, contender, figure)?.median;
            // Only positive values have a logarithm.
            (median > 0.0).then_some((f64::from(scale), median))
        };
        (contender, outcomes.scales(workload).into_iter().filter_map(point).collect::<Vec<_>>())
    };
    outcomes.contenders(workload).into_iter().map(curve).filter(|(_, points)| points.len() > 1).collect()
}

fn panel(svg: &mut String, workload: Workload, curves: &[Curve], top: f64) {
    let facts = workload.facts();
    let points = || curves.iter().flat_map(|(_, points)| points.iter().copied());
    let across = Axis::over(points().map(|(scale, _)| scale), LEFT, WIDTH - RIGHT);
    let up = Axis::over(points().map(|(_, value)| value), top + PANEL - BOTTOM, top + TOP);
    let [left, right, bottom, ceiling] = [across.start, across.end, up.start, up.end];
    word(svg, [left, top + 22.0], "start", "font-weight=\"bold\"", facts.title);
    word(svg, [right, bottom + 34.0], "end", "", facts.unit);
    for (value, x) in across.decades() {
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{bottom:.1}\" x2=\"{x:.1}\" y2=\"{ceiling:.1}\" stroke=\"#ddd\"/>"
        );
        word(svg, [x, bottom + 18.0], "middle", "", &round(value));
    }
    for (value, y) in up.decades() {
        let _ = writeln!(
            svg,
            "<line x1=\"{left:.1}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"
        );
        word(svg, [left - 8.0, y + 4.0], "end", "", &format!("{} {}", round(value), facts.shown[0]));
    }
    let mut legend = top + TOP + 8.0;
    for (contender, points) in curves {
        let (colour, dash) = pen(*contender);
        let path: Vec<String> = points
            .iter()
            .map(|(scale, value)| format!("{:.1},{:.1}", across.at(*scale), up.at(*value)))
            .collect();
        let pen = format!("fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\"");
        let _ = writeln!(svg, "<polyline points=\"{}\" {pen}/>", path.join(" "));
        for point in &path {
            if let Some((x, y)) = point.split_once(',') {
                let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{colour}\"/>");
            }
        }
        let (from, to) = (right + 15.0, right + 40.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{from:.1}\" y1=\"{legend:.1}\" x2=\"{to:.1}\" y2=\"{legend:.1}\" {pen}/>"
        );
        word(svg, [to + 6.0, legend + 4.0], "start", "", contender.title());
        legend += 18.0;
    }
}

/// A logarithmic axis over whole decades, between two coordinates.
struct Axis {
    first: f64,
    last: f64,
    start: f64,
    end: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, start: f64, end: f64) -> Self {
        let first = values.clone().fold(f64::INFINITY, f64::min).log10().floor();
        let last = values.fold(0.0, f64::max).log10().ceil().max(first + 1.0);
        Self { first, last, start, end }
    }

    fn at(&self, value: f64) -> f64 {
        self.start + (self.end - self.start) * (value.log10() - self.first) / (self.last - self.first)
    }

    fn decades(&self) -> impl Iterator<Item = (f64, f64)> {
        let next = |decade: &f64| (*decade < self.last).then_some(decade + 1.0);
        std::iter::successors(Some(self.first), next)
            .map(|decade| (10_f64.powf(decade), self.at(10_f64.powf(decade))))
    }
}

fn word(svg: &mut String, [x, y]: [f64; 2], anchor: &str, more: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {more}>{text}</text>");
}

/// Formats a power of ten.
fn round(value: f64) -> String {
    let text = digits(value);
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// The colour and dashes of a contender. Colour-blind people can tell these colours apart (Okabe
/// and Ito). Contenders other than leased are dashed.
fn pen(contender: Contender) -> (&'static str, &'static str) {
    match contender {
        Contender::Embedded | Contender::Stub | Contender::Client => ("#0072b2", "none"),
        Contender::Mongod => ("#009e73", "none"),
        Contender::ReplicaSet => ("#56b4e9", "none"),
        Contender::Etcd => ("#d55e00", "6 3"),
        Contender::EtcdThree => ("#e69f00", "6 3"),
        Contender::Redis => ("#cc79a7", "6 3"),
        Contender::Mongolock => ("#777777", "2 3"),
        Contender::Direct => ("#000000", "2 3"),
        Contender::Batched => ("#009e73", "2 3"),
        Contender::BatchedThree => ("#56b4e9", "2 3"),
        Contender::Ceiling => ("#aaaaaa", "2 3"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::tests::some;

    #[test]
    fn a_picture_is_well_formed() {
        let svg = of(&some()).expect("three scales");
        let (mut open, mut rest) = (Vec::new(), &*svg);
        while let Some((text, tag)) = rest.split_once('<') {
            assert!(!text.contains('>'), "{text}");
            let (tag, after) = tag.split_once('>').expect("the end of a tag");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            assert!(!tag.contains("NaN") && !tag.contains("inf"), "{tag}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None if tag.ends_with('/') => {}
                None => open.extend(tag.split(' ').next()),
            }
            rest = after;
        }
        assert!(open.is_empty(), "{open:?}");
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches("<circle").count(), 6);
    }

    #[test]
    fn without_curves_there_is_no_picture() {
        assert_eq!(of(&Outcomes::default()), None);
    }

    #[test]
    fn an_axis_has_whole_decades() {
        let axis = Axis::over([30.0, 2000.0].into_iter(), 0.0, 300.0);
        let decades: Vec<(f64, f64)> = axis.decades().collect();
        assert_eq!(decades.len(), 4);
        assert!((axis.at(100.0) - 100.0).abs() < 1e-9 && (decades[3].1 - 300.0).abs() < 1e-9);
        assert_eq!([1.0, 10.0, 1000.0, 0.1].map(round), ["1", "10", "1,000", "0.1"]);
    }
}
