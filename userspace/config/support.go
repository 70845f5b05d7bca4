// SPDX-License-Identifier: Apache-2.0

package config

import (
	"maps"
	"slices"
)

// Feature is something the file format has words for.
type Feature string

// The features that can be switched on one by one.
const (
	FeatureDeny           Feature = "deny"
	FeatureAllow          Feature = "allow"
	FeatureFlowsPerSource Feature = "flows_per_source"
	FeatureSYNsPerSource  Feature = "syns_per_source"
	FeatureLeastConns     Feature = "balance: least_connections"
	FeatureRandomTwo      Feature = "balance: random_two"
	FeatureOnDownReset    Feature = "on_down: reset"
	FeatureSlowStart      Feature = "slow_start"
	FeatureHealth         Feature = "health"
	FeatureMaxConnections Feature = "max_connections"
	FeatureBackup         Feature = "backup"
	FeatureHostNames      Feature = "backends by name"
)

// notBuilt is the one place that says what this build refuses although the file
// format has it, with what to do instead. Removing a line switches a feature
// on, together with the fields it needs in Config.
var notBuilt = map[Feature]string{
	FeatureDeny:           "leave the list empty",
	FeatureAllow:          "leave the list empty",
	FeatureFlowsPerSource: "use none",
	FeatureSYNsPerSource:  "use none",
	FeatureLeastConns:     "use round_robin or maglev",
	FeatureRandomTwo:      "use round_robin or maglev",
	FeatureOnDownReset:    "use keep",
	FeatureSlowStart:      "use none",
	FeatureHealth:         "use {type: none}",
	FeatureMaxConnections: "remove max_connections",
	FeatureBackup:         "use false",
	FeatureHostNames:      "use IP:port",
}

// NotBuilt lists what this build refuses as not supported yet.
func NotBuilt() []Feature {
	return slices.Sorted(maps.Keys(notBuilt))
}

// built says whether a feature can be used; if not, that is a problem at pos.
// What names the setting as the file has it.
func (r *reader) built(feature Feature, pos Position, what string) bool {
	remedy, missing := notBuilt[feature]
	if missing {
		r.refuse(pos, what+" is not supported yet", remedy)
	}
	return !missing
}
