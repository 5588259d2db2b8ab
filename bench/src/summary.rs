//! Medians, ranges and ratios of rounds. Pure.

use serde::Serialize;

/// The median and the range of a figure over several rounds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Summary {
    /// Summarizes the values. `None` if there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, least, most })
    }

    /// Summarizes the ratios within each round, because a disturbance affects both contenders of a
    /// round.
    pub(crate) fn of_ratios(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<Self> {
        let both = ours.iter().zip(theirs).filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?));
        Self::of(both.filter(|ratio| ratio.is_finite()))
    }

    /// Formats the median with its range, each with three significant digits.
    pub(crate) fn text(self) -> String {
        let [median, least, most] = [self.median, self.least, self.most].map(digits);
        if least == most { median } else { format!("{median} ({least} .. {most})") }
    }
}

/// Formats a value with three significant digits, and with thousands separators.
pub(crate) fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        large if large >= 99.95 => 0,
        middle if middle >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    let end = text.find('.').unwrap_or(text.len());
    thousands(&text[..end]) + &text[end..]
}

/// Formats a count with thousands separators.
pub(crate) fn count(value: u32) -> String {
    thousands(&value.to_string())
}

fn thousands(whole: &str) -> String {
    let mut separated = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) && !separated.ends_with('-') {
            separated.push(',');
        }
        separated.push(digit);
    }
    separated
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of([3.0, 1.0, 2.0]), Some(Summary { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Summary::of([4.0, 1.0]), Some(Summary { median: 2.5, least: 1.0, most: 4.0 }));
    }

    #[test]
    fn ratios_are_taken_within_each_round() {
        let ours = [Some(10.0), None, Some(30.0), Some(1.0)];
        let theirs = [Some(5.0), Some(1.0), Some(10.0), Some(0.0)];
        let ratios = Summary::of_ratios(&ours, &theirs);
        assert_eq!(ratios, Some(Summary { median: 2.5, least: 2.0, most: 3.0 }));
        assert_eq!(Summary::of_ratios(&ours, &[None; 4]), None);
    }

    #[test]
    fn values_have_three_significant_digits() {
        let shown = [0.0, 0.128, 9.996, 12.34, 99.96, 1234.5, 1_234_567.0, -123.0, -1234.0].map(digits);
        assert_eq!(shown, ["0.00", "0.13", "10.0", "12.3", "100", "1,234", "1,234,567", "-123", "-1,234"]);
        assert_eq!(Summary { median: 2.0, least: 2.0, most: 2.001 }.text(), "2.00");
        assert_eq!(Summary { median: 2.0, least: 1.0, most: 300.0 }.text(), "2.00 (1.00 .. 300)");
    }
}
