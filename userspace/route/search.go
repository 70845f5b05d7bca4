// SPDX-License-Identifier: Apache-2.0

package route

// search walks the candidates for a name in order of precedence. It lives on
// the caller's stack; Match and Explain share it, so they cannot disagree.
type search struct {
	table *Table
	name  string

	stage  stage
	list   []candidate // What is left of the current list.
	suffix string      // The next one to look for, in stageAnyLabels.
	regex  int         // The next one to try.
}

type stage uint8

const (
	stageStart stage = iota
	stageExact
	stageOneLabel
	stageAnyLabels
	stageRegex
	stageEnd
)

// next returns the next candidate whose pattern matches the name. Its
// conditions are for the caller to check.
func (s *search) next() (candidate, bool) {
	for {
		if len(s.list) > 0 {
			c := s.list[0]
			s.list = s.list[1:]
			return c, true
		}
		if s.stage == stageRegex {
			if c, ok := s.nextRegex(); ok {
				return c, true
			}
		}
		if s.stage == stageEnd {
			return candidate{}, false
		}
		s.advance()
	}
}

// advance puts the next non-exhausted stage's candidates into list.
func (s *search) advance() {
	t := s.table
	switch s.stage {
	case stageStart:
		if s.name == "" {
			s.list, s.stage = t.nameless, stageEnd
			return
		}
		s.list, s.stage = t.exact[s.name], stageExact
	case stageExact:
		s.suffix = cutLabel(s.name)
		if s.suffix != "" {
			s.list = t.oneLabel[s.suffix]
		}
		s.stage = stageOneLabel
	case stageOneLabel, stageAnyLabels:
		s.stage = stageAnyLabels
		if s.suffix == "" {
			s.stage = stageRegex
			return
		}
		if len(s.suffix) <= t.longest {
			s.list = t.anyLabels[s.suffix]
		}
		s.suffix = cutLabel(s.suffix)
	case stageRegex:
		s.list, s.stage = t.anyName, stageEnd
	}
}

func (s *search) nextRegex() (candidate, bool) {
	for s.regex < len(s.table.regex) {
		c := s.table.regex[s.regex]
		s.regex++
		if c.pattern.Regexp.MatchString(s.name) {
			return c, true
		}
	}
	return candidate{}, false
}
